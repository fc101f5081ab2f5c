//! The clips of `protohead train --data`: those of a run, wherever they are, and no others.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::{protohead, refused};

/// Two keywords of three clips of noise.
fn noise(data: &Path) {
    let spec = hound::WavSpec {
        channels: 1,
        sample_rate: 16_000,
        bits_per_sample: 16,
        sample_format: hound::SampleFormat::Int,
    };
    let mut state = 1u32;
    for keyword in ["no", "yes"] {
        fs::create_dir_all(data.join(keyword)).expect("the folder is writable");
        for clip in ["a.wav", "b.wav", "c.wav"] {
            let path = data.join(keyword).join(clip);
            let mut writer = hound::WavWriter::create(path, spec).expect("the folder is writable");
            for _ in 0..16_000 {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let sample = (state >> 16) as i16 / 4;
                writer.write_sample(sample).expect("the folder is writable");
            }
            writer.finalize().expect("the folder is writable");
        }
    }
    let list = data.join("testing_list.txt");
    fs::write(list, "no/c.wav\nyes/c.wav\n").expect("the folder is writable");
    // What a file system keeps for itself is no keyword.
    let found = data.join("lost+found");
    fs::create_dir(&found).expect("the folder is writable");
    fs::copy(data.join("no/a.wav"), found.join("a.wav")).expect("the folder is writable");
}

#[test]
fn a_run_goes_on_with_its_own_clips_only_wherever_they_are() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let [data, moved, run] = ["data", "moved", "run"].map(|name| folder.path().join(name));
    let run_name = run.to_string_lossy().into_owned();
    let train = |data: &Path, more: &[&str]| {
        let data = data.to_string_lossy().into_owned();
        let arguments = ["train", "--data", &data, "--out", &run_name];
        protohead(&[&arguments, more].concat())
    };
    noise(&data);
    let begun = train(&data, &["--tau", "1", "--epochs", "1", "--device", "cpu"]);
    assert!(begun.status.success(), "{begun:?}");
    fs::rename(&data, &moved).expect("the folder is writable");
    let nowhere = protohead(&["evaluate", &run_name, "--device", "cpu"]);
    let stderr = String::from_utf8_lossy(&nowhere.stderr);
    assert!(
        stderr.contains("say where they are with --data"),
        "{stderr}"
    );
    // What a killed process had begun to write goes.
    let unfinished = [".protohead-x", "cache/.protohead-y"].map(|name| run.join(name));
    let old = run.join("checkpoint.old");
    for path in &unfinished {
        fs::write(path, "half").expect("the folder is writable");
    }
    fs::create_dir(&old).expect("the folder is writable");
    let resumed = train(&moved, &["--resume"]);
    assert!(resumed.status.success(), "{resumed:?}");
    assert!(!unfinished.iter().any(|path| path.exists()) && !old.exists());
    let evaluated = protohead(&["evaluate", &run_name, "--device", "cpu"]);
    assert!(evaluated.status.success(), "it knows where they are now");
    for [one, other] in [
        ["no/a.wav", "yes/a.wav"],
        ["no/c.wav", "yes/c.wav"],
        ["no/a.wav", "no/c.wav"],
    ] {
        let swap = || {
            let [one, other, aside] = [one, other, "aside"].map(|name| moved.join(name));
            fs::rename(&one, &aside).expect("the folder is writable");
            fs::rename(&other, &one).expect("the folder is writable");
            fs::rename(&aside, &other).expect("the folder is writable");
        };
        let kept = content(&run);
        swap();
        let refused = train(&moved, &["--resume"]);
        let evaluated = protohead(&["evaluate", &run_name, "--device", "cpu"]);
        swap();
        let stderr = String::from_utf8_lossy(&refused.stderr);
        assert_eq!(refused.status.code(), Some(2), "{stderr}");
        assert!(
            stderr.contains("are not those that the run began with"),
            "{stderr}"
        );
        // Other clips may be evaluated, and that is told.
        let stderr = String::from_utf8_lossy(&evaluated.stderr);
        assert!(evaluated.status.success(), "{stderr}");
        assert!(
            stderr.contains("not those that the run was trained with"),
            "{stderr}"
        );
        assert!(content(&run) == kept, "the run's folder changed");
    }
}

#[test]
fn validation_clips_are_reported_and_not_trained_on() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let data = folder.path().join("data");
    noise(&data);
    let run = |name: &str, says: &str| {
        let out = folder.path().join(name);
        let [data, named] = [&data, &out].map(|path| path.to_string_lossy().into_owned());
        let arguments = ["train", "--data", &data, "--out", &named, "--device", "cpu"];
        let output = protohead(&[&arguments[..], &["--tau", "1", "--epochs", "2"]].concat());
        assert!(output.status.success(), "{output:?}");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(said.contains(says), "{said}");
        let told = String::from_utf8_lossy(&output.stderr);
        let left_out = "keywords that are not here: Yes and 1 more";
        assert_eq!(told.contains(left_out), name == "with", "{told}");
        out
    };
    let list = data.join("validation_list.txt");
    // Of keywords that are not here, as in a part of a dataset: they are told, and left out.
    let others = "no/b.wav\nyes/b.wav\nYes/a.wav\nup/a.wav\n";
    fs::write(&list, others).expect("the folder is writable");
    let with = run("with", "2 training, 2 validation and 2 test clips");
    fs::remove_file(list).expect("the folder is writable");
    for clip in ["no/b.wav", "yes/b.wav"] {
        fs::remove_file(data.join(clip)).expect("the folder is writable");
    }
    let without = run("without", "2 training, 0 validation and 2 test clips");
    let model = |run: &Path| fs::read(run.join("model.bpk")).expect("written by train");
    assert!(model(&with) == model(&without), "they were trained on");
    let reported = |run: &Path| -> Vec<Option<f64>> {
        let metrics = fs::read_to_string(run.join("metrics.jsonl")).expect("written by train");
        let lines = metrics
            .lines()
            .map(serde_json::from_str::<serde_json::Value>);
        lines
            .map(|line| line.expect("written as JSON")["validation_accuracy"].as_f64())
            .collect()
    };
    assert_eq!(reported(&without), [None, None]);
    for accuracy in reported(&with) {
        assert!(accuracy.is_some_and(|v| [0.0, 50.0, 100.0].contains(&v)));
    }
}

/// Every file in a folder and those in it, with its bytes.
fn content(folder: &Path) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("the folder is readable") {
        let path = entry.expect("the folder is readable").path();
        match path.is_dir() {
            true => found.extend(content(&path)),
            false => found.push((path.clone(), fs::read(&path).expect("it is readable"))),
        }
    }
    found.sort();
    found
}

#[cfg(unix)]
#[test]
fn a_clip_that_is_a_link_to_nothing_is_missed() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let [data, run] = ["data", "run"].map(|name| folder.path().join(name));
    noise(&data);
    std::os::unix::fs::symlink("nowhere", data.join("no/d.wav")).expect("the folder is writable");
    let [data, out] = [&data, &run].map(|path| path.to_string_lossy().into_owned());
    let arguments = ["train", "--data", &data, "--out", &out, "--device", "cpu"];
    refused(&arguments, &run, "no/d.wav: No such file");
}

#[test]
fn a_run_in_a_place_that_is_no_folder_is_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("file");
    fs::write(&file, "somebody's").expect("the folder is writable");
    let name = file.to_string_lossy();
    let output = protohead(&["train", "--synthetic", "--device", "cpu", "--out", &name]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("it is there, and no folder"), "{stderr}");
    assert_eq!(fs::read(&file).expect("it is there"), b"somebody's");
}

#[cfg(unix)]
#[test]
fn a_folder_whose_name_is_no_utf_8_is_refused() {
    use std::os::unix::ffi::OsStringExt;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let data = folder
        .path()
        .join(std::ffi::OsString::from_vec(b"sp\xe9ech".to_vec()));
    fs::create_dir(&data).expect("the folder is writable");
    let out = folder.path().join("run");
    let output = Command::new(env!("CARGO_BIN_EXE_protohead"))
        .args(["train", "--device", "cpu", "--data"])
        .arg(&data)
        .arg("--out")
        .arg(&out)
        .output()
        .expect("starts");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("expected a path in UTF-8"), "{stderr}");
    assert!(!out.exists());
}
