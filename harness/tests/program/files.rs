//! `protohead loss` and `protohead prototypes`.

use std::fs;
use std::path::Path;

use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::{protohead, refused};

/// A tensor to be written: name, dtype, shape, bytes.
pub(crate) type Tensor<'a> = (&'a str, Dtype, Vec<usize>, Vec<u8>);

pub(crate) fn floats<'a>(name: &'a str, shape: &[usize]) -> Tensor<'a> {
    let count: usize = shape.iter().product();
    let bytes = (0..count)
        .flat_map(|i| (((i * 37 + 11) % 17) as f32 - 8.0).to_le_bytes())
        .collect();
    (name, Dtype::F32, shape.to_vec(), bytes)
}

pub(crate) fn labels(values: &[i64]) -> Tensor<'static> {
    let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    ("labels", Dtype::I64, vec![values.len()], bytes)
}

fn good() -> Vec<Tensor<'static>> {
    vec![
        floats("embeddings", &[2, 4, 5]),
        floats("prototypes", &[2, 3, 5]),
        labels(&[0, 2, 1, 0]),
    ]
}

pub(crate) fn write(path: &Path, tensors: &[Tensor]) {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        let view =
            TensorView::new(*dtype, shape.clone(), bytes).expect("the test's tensors are sound");
        (*name, view)
    });
    let bytes = safetensors::serialize(views, None).expect("the test's tensors are sound");
    fs::write(path, bytes).expect("the folder is writable");
}

#[test]
fn loss_writes_what_it_promises_and_the_same_bytes_twice() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let [input, out, again] = ["in", "out", "again"].map(|name| folder.path().join(name));
    write(&input, &good());
    let path = |p: &Path| p.to_string_lossy().into_owned();
    for (reduction, loss) in [("mean", vec![2]), ("sum", vec![2]), ("none", vec![2, 4])] {
        let run = |out: &Path| {
            let output = protohead(&[
                "loss",
                &path(&input),
                "--out",
                &path(out),
                "--reduction",
                reduction,
                "--head-weights",
                "-0.5,1",
                "--device",
                "cpu",
            ]);
            assert!(
                output.status.success(),
                "{}",
                String::from_utf8_lossy(&output.stderr)
            );
            fs::read(out).expect("the output is there")
        };
        let bytes = run(&out);
        assert_eq!(bytes, run(&again));
        let file = SafeTensors::deserialize(&bytes).expect("the output is safetensors");
        for (name, dtype, shape) in [
            ("loss", Dtype::F32, loss),
            ("total", Dtype::F32, vec![]),
            ("lse", Dtype::F32, vec![2, 4]),
            ("predictions", Dtype::I64, vec![2, 4]),
            ("grad_embeddings", Dtype::F32, vec![2, 4, 5]),
            ("grad_prototypes", Dtype::F32, vec![2, 3, 5]),
            ("grad_scale", Dtype::F32, vec![2]),
        ] {
            let tensor = file.tensor(name).expect("promised");
            assert_eq!(
                (tensor.dtype(), tensor.shape()),
                (dtype, &shape[..]),
                "{name}"
            );
        }
    }
}

/// A scale of 0 has no gradient; the operands' are zeros.
#[test]
fn loss_of_a_scale_of_zero_has_no_gradient_of_it() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let [input, out] = ["in", "out"].map(|name| folder.path().join(name));
    write(&input, &good());
    let [input, name] = [&input, &out].map(|p| p.to_string_lossy().into_owned());
    let arguments = ["loss", &input, "--out", &name, "--scale", "0"];
    let output = protohead(&[&arguments[..], &["--device", "cpu"]].concat());
    assert!(output.status.success(), "{output:?}");
    let bytes = fs::read(&out).expect("the output is there");
    let file = SafeTensors::deserialize(&bytes).expect("the output is safetensors");
    assert!(file.tensor("grad_scale").is_err());
    let zeros = file.tensor("grad_prototypes").expect("promised");
    assert!(zeros.data().iter().all(|&byte| byte & 0x7f == 0));
}

#[test]
fn loss_times_steps_beside_the_same_output() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let [input, plain, timed] = ["in", "plain", "timed"].map(|name| folder.path().join(name));
    write(&input, &good());
    let run = |out: &Path, options: &[&str]| {
        let [input, name] = [&input, out].map(|p| p.to_string_lossy().into_owned());
        let arguments = ["loss", &input, "--out", &name, "--device", "cpu"];
        let output = protohead(&[&arguments, options].concat());
        assert!(output.status.success(), "{output:?}");
        let lines = String::from_utf8(output.stdout).expect("text");
        (fs::read(out).expect("the output is there"), lines)
    };
    let (bytes, total) = run(&plain, &[]);
    let (timed, lines) = run(&timed, &["--repeat", "3"]);
    assert_eq!(bytes, timed);
    // A CPU records no graph.
    let step = lines.strip_prefix(&total).expect("the same total first");
    let time = step.strip_prefix("step ").expect("then a step's time");
    let time = time.strip_suffix(" ms\n").expect("in milliseconds");
    assert!(time.parse::<f64>().expect("a number") > 0.0, "{step}");
}

#[test]
fn prototypes_are_class_means_and_counts() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let [input, out] =
        ["in", "out"].map(|name| folder.path().join(name).to_string_lossy().into_owned());
    write(
        Path::new(&input),
        &[floats("embeddings", &[1, 4, 2]), labels(&[0, 2, 0, 2])],
    );
    let run = || {
        let output = protohead(&[
            "prototypes",
            &input,
            "--out",
            &out,
            "--classes",
            "4",
            "--device",
            "cpu",
        ]);
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        fs::read(&out).expect("the output is there")
    };
    let bytes = run();
    assert_eq!(bytes, run(), "the same bytes twice");
    let file = SafeTensors::deserialize(&bytes).expect("the output is safetensors");
    let numbers: Vec<f32> = file
        .tensor("prototypes")
        .expect("promised")
        .data()
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect();
    let value = |i: usize| ((i * 37 + 11) % 17) as f32 - 8.0;
    let mean = |a: usize, b: usize, d: usize| (value(a * 2 + d) + value(b * 2 + d)) / 2.0;
    let expected = [
        mean(0, 2, 0),
        mean(0, 2, 1),
        0.0,
        0.0,
        mean(1, 3, 0),
        mean(1, 3, 1),
        0.0,
        0.0,
    ];
    assert_eq!(numbers, expected);
    let counts: Vec<u8> = [2i64, 0, 2, 0]
        .iter()
        .flat_map(|v| v.to_le_bytes())
        .collect();
    assert_eq!(file.tensor("counts").expect("promised").data(), counts);
}

/// An ignored label counts nowhere, not even as the highest.
#[test]
fn prototypes_leave_out_what_is_ignored() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let [input, out] =
        ["in", "out"].map(|name| folder.path().join(name).to_string_lossy().into_owned());
    write(
        Path::new(&input),
        &[floats("embeddings", &[2, 4, 2]), labels(&[0, 255, 1, 0])],
    );
    let ignoring = ["--ignore-index", "255", "--device", "cpu"];
    let output = protohead(&[&["prototypes", &input, "--out", &out], &ignoring[..]].concat());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let bytes = fs::read(&out).expect("the output is there");
    let file = SafeTensors::deserialize(&bytes).expect("the output is safetensors");
    let prototypes = file.tensor("prototypes").expect("promised");
    assert_eq!(prototypes.shape(), [2, 2, 2]);
    let counts: Vec<u8> = [2i64, 1].iter().flat_map(|v| v.to_le_bytes()).collect();
    assert_eq!(file.tensor("counts").expect("promised").data(), counts);
}

#[test]
fn damaged_input_of_loss_gets_one_line_and_leaves_nothing() {
    let with = |name: &str, tensor: Tensor<'static>| -> Vec<Tensor<'static>> {
        let mut tensors = good();
        tensors.retain(|t| t.0 != name);
        tensors.push(tensor);
        tensors
    };
    let mut nan = floats("embeddings", &[2, 4, 5]);
    nan.3[4 * 7..4 * 8].copy_from_slice(&f32::NAN.to_le_bytes());
    let without: Vec<Tensor> = good().into_iter().filter(|t| t.0 != "prototypes").collect();
    let wrong_dtype = ("embeddings", Dtype::F64, vec![1], vec![0; 8]);
    let cases: Vec<(Vec<Tensor>, Vec<&str>, &str)> = vec![
        (without, vec![], "no tensor `prototypes`"),
        (with("embeddings", nan), vec![], "not finite at [0, 1, 2]"),
        (with("embeddings", wrong_dtype), vec![], "F64"),
        (
            with("embeddings", floats("embeddings", &[4, 5])),
            vec![],
            "shape [4, 5]",
        ),
        (
            with("embeddings", floats("embeddings", &[2, 0, 5])),
            vec![],
            "empty",
        ),
        (
            with("prototypes", floats("prototypes", &[2, 3, 4])),
            vec![],
            "in: prototypes: shape [2, 3, 4]",
        ),
        (
            with("labels", labels(&[0, 1])),
            vec![],
            "labels: shape [2], expected [4]",
        ),
        (
            with("labels", labels(&[0, 1, 3, 0])),
            vec![],
            "label 3 of row 2",
        ),
        (
            with("labels", labels(&[0, 1, 1 << 40, 0])),
            vec![],
            "label 1099511627776 of row 2",
        ),
        (good(), vec!["--active", "9"], "--active: 9 active classes"),
        (good(), vec!["--scale", "NaN"], "--scale is NaN"),
        (good(), vec!["--scale", "-inf"], "--scale is -inf"),
        (good(), vec!["--label-smoothing", "-0.1"], "between 0 and 1"),
        (good(), vec!["--active", "-1"], "'-1' for '--active"),
        (
            good(),
            vec!["--label-smoothing", "2"],
            "--label-smoothing is 2",
        ),
        (
            good(),
            vec!["--head-weights", "1"],
            "--head-weights: 1 head weights for 2 heads",
        ),
        (good(), vec!["--device", "abacus"], "abacus"),
        (good(), vec!["--reduction", "median"], "median"),
        (good(), vec!["--repeat", "0"], "--repeat"),
    ];
    for (tensors, options, says) in cases {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let [input, out] = ["in", "out"].map(|name| folder.path().join(name));
        write(&input, &tensors);
        let [input, out_name] = [&input, &out].map(|p| p.to_string_lossy().into_owned());
        let mut arguments = vec!["loss", &input, "--out", &out_name];
        if !options.contains(&"--device") {
            arguments.extend(["--device", "cpu"]);
        }
        arguments.extend(options);
        refused(&arguments, &out, says);
    }
}

#[test]
fn damaged_files_get_one_line_and_leave_nothing() {
    for command in ["loss", "prototypes"] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let [input, out] = ["in", "out"].map(|name| folder.path().join(name));
        let [name, out_name] = [&input, &out].map(|p| p.to_string_lossy().into_owned());
        refused(&[command, &name, "--out", &out_name], &out, "No such file");
        write(&input, &good());
        let whole = fs::read(&input).expect("just written");
        for length in [0, 4, 40, whole.len() - 1] {
            fs::write(&input, &whole[..length]).expect("the folder is writable");
            refused(
                &[command, &name, "--out", &out_name],
                &out,
                "not a safetensors file",
            );
        }
        write(&input, &good());
        let output = protohead(&[command, &name, "--out", &name]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(stderr.contains("is the file that is read"), "{stderr}");
        assert_eq!(fs::read(&input).expect("still there"), whole);
        fs::write(&input, b"RIFF....WAVEfmt not tensors at all").expect("the folder is writable");
        refused(
            &[command, &name, "--out", &out_name],
            &out,
            "not a safetensors file",
        );
        let missing = folder.path().join("nowhere/out");
        write(&input, &good());
        let output = protohead(&[
            command,
            &name,
            "--out",
            &missing.to_string_lossy(),
            "--device",
            "cpu",
        ]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(stderr.contains("there is no folder"), "{stderr}");
        let slash = format!("{}/", folder.path().join("results").display());
        let output = protohead(&[command, &name, "--out", &slash]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(stderr.contains("it names a folder"), "{stderr}");
        refused(&[command, &name], &out, "--out");
        refused(&[command, "--out", &out_name], &out, "INPUT");
    }
}

#[test]
fn damaged_input_of_prototypes_gets_one_line_and_leaves_nothing() {
    let cases: Vec<(Vec<Tensor>, Vec<&str>, &str)> = vec![
        (
            vec![floats("embeddings", &[1, 2, 2])],
            vec![],
            "no tensor `labels`",
        ),
        (vec![labels(&[0, 1])], vec![], "no tensor `embeddings`"),
        (
            vec![floats("embeddings", &[4]), labels(&[0, 1])],
            vec![],
            "shape [4]",
        ),
        (
            vec![floats("embeddings", &[1, 2, 2]), labels(&[0])],
            vec![],
            "labels: shape [1]",
        ),
        (
            vec![floats("embeddings", &[1, 2, 2]), labels(&[0, 5])],
            vec!["--classes", "2"],
            "label 5 of row 1",
        ),
        (
            vec![floats("embeddings", &[1, 2, 2]), labels(&[-3, -1])],
            vec![],
            "not a class",
        ),
        (
            vec![floats("embeddings", &[1, 2, 2]), labels(&[-100, -100])],
            vec![],
            "every row is ignored: --classes",
        ),
        (
            vec![floats("embeddings", &[1, 2, 2]), labels(&[0, 60_000_000])],
            vec![],
            "label 60000000 of row 1 is high for 2 rows",
        ),
        (
            vec![floats("embeddings", &[1, 2, 2]), labels(&[0, 1])],
            vec!["--classes", "0"],
            "--classes is 0",
        ),
    ];
    for (tensors, options, says) in cases {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let [input, out] = ["in", "out"].map(|name| folder.path().join(name));
        write(&input, &tensors);
        let [input, out_name] = [&input, &out].map(|p| p.to_string_lossy().into_owned());
        let mut arguments = vec!["prototypes", &input, "--out", &out_name, "--device", "cpu"];
        arguments.extend(options);
        refused(&arguments, &out, says);
    }
}

#[test]
fn what_is_not_finite_is_written_and_told() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let [input, out] = ["in", "out"].map(|name| folder.path().join(name));
    write(&input, &good());
    let [input, name] = [&input, &out].map(|p| p.to_string_lossy().into_owned());
    for (weight, says) in [
        ("1e-3", ""),
        ("-.5", ""),
        (
            "3e38",
            "out: not finite: total, grad_embeddings, grad_prototypes, grad_scale\n",
        ),
    ] {
        let weights = format!("{weight},{weight}");
        let arguments = ["loss", &input, "--out", &name, "--head-weights", &weights];
        let output = protohead(&[&arguments[..], &["--device", "cpu"]].concat());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && out.exists(), "{stderr}");
        assert_eq!(stderr.is_empty(), says.is_empty(), "{stderr}");
        assert!(stderr.ends_with(says), "{stderr}");
    }
}

#[cfg(unix)]
#[test]
fn a_link_leads_to_its_file() {
    use std::os::unix::fs::symlink;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let [input, plain, target, link] =
        ["in", "plain", "target", "link"].map(|name| folder.path().join(name));
    write(&input, &good());
    let run = |out: &Path| {
        let [input, out] = [&input, out].map(|p| p.to_string_lossy().into_owned());
        protohead(&["loss", &input, "--out", &out, "--device", "cpu"])
    };
    assert!(run(&plain).status.success());
    symlink("target", &link).expect("the folder is writable");
    let nowhere = run(&link);
    let stderr = String::from_utf8_lossy(&nowhere.stderr);
    assert_eq!(nowhere.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("a link to no file"), "{stderr}");
    assert!(link.is_symlink() && !target.exists());
    fs::write(&target, "old").expect("the folder is writable");
    assert!(run(&link).status.success());
    assert!(link.is_symlink(), "the link is gone");
    let [plain, target] = [plain, target].map(|path| fs::read(path).expect("it is there"));
    assert_eq!(plain, target);
}

/// A full device takes nothing: a result that is lost is no success, and a lost message no panic.
#[cfg(target_os = "linux")]
#[test]
fn lost_lines_are_no_success_and_no_panic() {
    use std::fs::OpenOptions;
    use std::process::Command;
    let full = || {
        let full = OpenOptions::new().write(true).open("/dev/full");
        full.expect("Linux has it")
    };
    let program = || Command::new(env!("CARGO_BIN_EXE_protohead"));
    let lost = program().arg("devices").stdout(full()).output();
    let lost = lost.expect("starts");
    let stderr = String::from_utf8_lossy(&lost.stderr);
    assert_eq!(lost.status.code(), Some(2), "{stderr}");
    assert_eq!(stderr.trim_end().lines().count(), 1, "{stderr}");
    assert!(stderr.contains("standard output"), "{stderr}");
    for arguments in [&["loss", "nothing", "--out", "x"][..], &["--nothing"]] {
        let silent = program().args(arguments).stderr(full()).output();
        assert_eq!(silent.expect("starts").status.code(), Some(2));
    }
}

#[test]
fn a_long_mistake_is_told_in_one_line_that_ends() {
    let name = "long\u{1b}[2J\n".repeat(1000);
    let output = protohead(&["loss", &name, "--out", "x"]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.chars().count() < 1100, "{stderr}");
    assert!(!stderr.contains('\u{1b}'), "{stderr:?}");
}

#[test]
fn the_version_is_that_of_the_program() {
    let output = protohead(&["--version"]);
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert_eq!(stdout, format!("protohead {}\n", env!("CARGO_PKG_VERSION")));
}
