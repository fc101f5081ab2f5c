//! `protohead train` and `protohead evaluate` on synthesised keywords, and their mistakes.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::{protohead, refused};

#[test]
fn damaged_input_of_train_gets_one_line_and_leaves_nothing() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let data = folder.path().join("data");
    let out = folder.path().join("run");
    let [data_name, out_name] = [&data, &out].map(|p| p.to_string_lossy().into_owned());
    let train = |says: &str| {
        refused(
            &[
                "train", "--data", &data_name, "--out", &out_name, "--device", "cpu",
            ],
            &out,
            says,
        );
    };
    train("No such file");
    fs::create_dir(&data).expect("the folder is writable");
    train("folders with WAV files: 0");
    for keyword in ["no", "yes"] {
        fs::create_dir(data.join(keyword)).expect("the folder is writable");
        for clip in ["a.wav", "b.wav"] {
            fs::write(data.join(keyword).join(clip), b"RIFFnot a wav")
                .expect("the folder is writable");
        }
    }
    train("there is no testing_list.txt");
    let list = |text: &str| {
        fs::write(data.join("testing_list.txt"), text).expect("the folder is writable");
    };
    list("");
    train("keyword no has 2 clips to train on, 0 in testing_list.txt");
    list("no/b.wav\nyes/c.wav\nmaybe/a.wav\n");
    train("names yes/c.wav, and there is no such clip");
    fs::write(data.join("yes/c.txt"), "no clip").expect("the folder is writable");
    list("no/b.wav\nyes/c.txt\n");
    train("names yes/c.txt, and there is no such clip");
    list("./no/b.wav\nyes/b.wav\nmaybe/a.wav\n");
    train("no WAV file that is read");
    refused(
        &["train", "--synthetic", "--epochs", "0", "--out", &out_name],
        &out,
        "--epochs is 0",
    );
    refused(
        &[
            "train",
            "--synthetic",
            "--keywords",
            "1",
            "--out",
            &out_name,
        ],
        &out,
        "--keywords is 1",
    );
    refused(
        &["train", "--out", &out_name],
        &out,
        "--data DIR, or --synthetic",
    );
    refused(
        &["train", "--resume", "--out", &out_name],
        &out,
        "no run to resume",
    );
    refused(
        &["train", "--data", &out_name, "--voices", "3"],
        &out,
        "cannot be used with",
    );
    for (option, value) in [
        ("--tau", "65"),
        ("--epochs", "9223372036854775808"),
        ("--scale", "nan"),
        ("--scale", "0"),
        ("--learning-rate", "inf"),
        ("--learning-rate", "0"),
        ("--lambda", "1e39"),
        ("--lambda-shuffled", "-1"),
        ("--momentum", "1.5"),
        ("--weight-decay", "-1"),
        ("--angular-margin", "1.6"),
        ("--cosine-margin", "-0.5"),
        ("--head-weights", "1,1"),
        ("--head-weights", "1,1,-1"),
        ("--base", "1"),
        ("--ways", "0"),
        ("--shots", "0"),
    ] {
        let option_value = format!("{option}={value}");
        refused(
            &["train", "--synthetic", &option_value, "--out", &out_name],
            &out,
            &format!("{option} is "),
        );
    }
    refused(
        &["train", "--synthetic", "--tau", "x", "--out", &out_name],
        &out,
        "x",
    );
}

/// Training in a process of its own, which is killed with this value.
pub(crate) struct Trained(std::process::Child);

impl Trained {
    /// Begun, and come as far as to have left a file.
    pub(crate) fn until(mut train: Command, file: &Path) -> Self {
        let started = train
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn();
        let mut trained = Self(started.expect("starts"));
        let begun = std::time::Instant::now();
        let name = file.display();
        while !file.exists() {
            let ended = trained.0.try_wait().expect("can be asked");
            assert_eq!(ended, None, "it ended without {name}");
            assert!(begun.elapsed().as_secs() < 300, "it never left {name}");
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        trained
    }
}

impl Drop for Trained {
    fn drop(&mut self) {
        // Where it has ended already there is nothing to kill.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Asserts that two finished runs have left the same.
pub(crate) fn same_bytes(one: &Path, other: &Path) {
    for name in [
        "accuracy.json",
        "checkpoint/digest.json",
        "checkpoint/metrics.jsonl",
        "checkpoint/model.bpk",
        "checkpoint/optimizer.bpk",
        "config.json",
        "curves.svg",
        "data.json",
        "metrics.jsonl",
        "model.bpk",
        "model.json",
        "prototypes.safetensors",
    ] {
        let [a, b] = [one, other].map(|run| fs::read(run.join(name)).expect("written"));
        assert!(a == b, "{name} differs");
    }
}

#[test]
fn a_run_that_was_killed_before_its_first_checkpoint_begins_again() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let [straight, broken] = ["straight", "broken"].map(|name| folder.path().join(name));
    let whole = train(&straight, "2", &[]).output().expect("starts");
    assert!(whole.status.success(), "{whole:?}");
    let begun = train(&broken, "2", &[]);
    drop(Trained::until(begun, &broken.join("config.json")));
    assert!(
        !broken.join("checkpoint").exists(),
        "it was killed too late"
    );
    let again = train(&broken, "2", &["--resume"]).output().expect("starts");
    assert!(again.status.success(), "{again:?}");
    same_bytes(&straight, &broken);
}

/// To train a tiny network on synthesised keywords.
pub(crate) fn train(out: &Path, epochs: &str, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_protohead"));
    command
        .args([
            "train",
            "--synthetic",
            "--keywords",
            "4",
            "--voices",
            "4",
            "--tau",
            "1",
            "--batch",
            "6",
        ])
        .args(["--device", "cpu", "--epochs", epochs, "--out"])
        .arg(out)
        .args(more);
    command
}

#[test]
fn a_run_that_was_killed_resumes_to_the_same_weights_to_the_bit() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let [straight, broken] = ["straight", "broken"].map(|name| folder.path().join(name));
    assert!(
        train(&straight, "12", &[])
            .output()
            .expect("starts")
            .status
            .success()
    );
    // Killed as soon as the first epoch is on disk.
    let begun = train(&broken, "12", &[]);
    let child = Trained::until(begun, &broken.join("metrics.jsonl"));
    let beside = train(&broken, "12", &["--resume"])
        .output()
        .expect("starts");
    let stderr = String::from_utf8_lossy(&beside.stderr);
    assert_eq!(beside.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("another process trains in it"), "{stderr}");
    drop(child);
    assert!(!broken.join("accuracy.json").exists());
    let unfinished = protohead(&["evaluate", &broken.to_string_lossy(), "--device", "cpu"]);
    let stderr = String::from_utf8_lossy(&unfinished.stderr);
    assert_eq!(unfinished.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("is not finished"), "{stderr}");
    let refused = train(&broken, "12", &[]).output().expect("starts");
    assert_eq!(refused.status.code(), Some(2));
    // Its options are the run's: others are refused, and none needs to be said again.
    let name = broken.to_string_lossy();
    let resume = ["train", "--resume", "--out", &name];
    for (option, value, says) in [
        ("--epochs", "4", "holds a run with --epochs 12, not 4"),
        ("--voices", "5", "--voices 4, not 5"),
        ("--momentum", "0.5", "--momentum 0.9, not 0.5"),
        ("--weight-decay", "0", "--weight-decay 0.001, not 0"),
        ("--angular-margin", "0.5", "--angular-margin 0, not 0.5"),
        ("--cosine-margin", "0.5", "--cosine-margin 0, not 0.5"),
        ("--head-weights", "1,1,0", "--head-weights 1,1,1, not 1,1,0"),
    ] {
        let output = protohead(&[&resume[..], &[option, value]].concat());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(stderr.contains(says), "{stderr}");
    }
    // A checkpoint of files that do not belong together is no checkpoint.
    let checkpoint = broken.join("checkpoint");
    for (name, instead) in [
        ("optimizer.bpk", "model.bpk"),
        ("metrics.jsonl", "digest.json"),
    ] {
        let [right, wrong] =
            [name, instead].map(|name| fs::read(checkpoint.join(name)).expect("written"));
        for damaged in [&wrong, &right[..right.len() / 2], &[]] {
            fs::write(checkpoint.join(name), damaged).expect("the folder is writable");
            let output = protohead(&resume);
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(2), "{name}: {stderr}");
            assert!(
                stderr.contains("do not belong together"),
                "{name}: {stderr}"
            );
        }
        fs::write(checkpoint.join(name), right).expect("the folder is writable");
    }
    // The second time there is nothing left to do.
    for _ in 0..2 {
        assert!(protohead(&resume).status.success());
        same_bytes(&straight, &broken);
    }
    // Evaluating again prints the same table.
    let evaluate = |run: &Path| {
        let output = protohead(&["evaluate", &run.to_string_lossy(), "--device", "cpu"]);
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        output.stdout
    };
    assert_eq!(evaluate(&straight), evaluate(&broken));
}

#[test]
fn sessions_are_those_that_were_asked_for() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().join("run");
    let name = out.to_string_lossy();
    let too_many = ["--base", "3", "--ways", "2"];
    let output = train(&out, "1", &too_many).output().expect("starts");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    let says = "3 base classes and sessions of 2 do not add up to 4 keywords";
    assert!(stderr.contains(says), "{stderr}");
    assert!(!out.exists());
    // Four voices leave four clips to draw the shots from.
    let asked = ["--base", "2", "--ways", "1", "--shots", "9"];
    let output = train(&out, "1", &asked).output().expect("starts");
    let said = String::from_utf8_lossy(&output.stdout);
    let says = "4 keywords: 2 base classes, 2 sessions of 1 with 4 shots; 16 training, 2 validation and 4 test";
    assert!(said.contains(says), "{said}");
    let table = fs::read_to_string(out.join("accuracy.json")).expect("written by train");
    let table: serde_json::Value = serde_json::from_str(&table).expect("written as JSON");
    let classes = |session: usize| table[session]["classes"].as_u64();
    assert_eq!([0, 1, 2].map(classes), [2, 3, 4].map(Some), "{table}");
    let evaluated = protohead(&["evaluate", &name, "--device", "cpu"]);
    let evaluated = String::from_utf8_lossy(&evaluated.stdout);
    assert!(
        !evaluated.is_empty() && said.ends_with(&*evaluated),
        "{said}{evaluated}"
    );
    let other = protohead(&["train", "--resume", "--out", &name, "--ways", "2"]);
    let stderr = String::from_utf8_lossy(&other.stderr);
    assert!(
        stderr.contains("holds a run with --ways 1, not 2"),
        "{stderr}"
    );
    let without_base = ["train", "--resume", "--out", &name];
    assert!(protohead(&without_base).status.success());
}

#[test]
fn a_folder_of_something_else_is_refused_and_stays_as_it_is() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let config = folder.path().join("config.json");
    for (text, more) in [("{\"name\": 1}", &[][..]), ("no json", &["--resume"])] {
        fs::write(&config, text).expect("the folder is writable");
        let output = train(folder.path(), "1", more).output().expect("starts");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert_eq!(stderr.trim_end().lines().count(), 1, "{stderr}");
        assert!(stderr.contains("config.json: damaged"), "{stderr}");
        assert_eq!(fs::read_to_string(&config).expect("still there"), text);
        let files = fs::read_dir(folder.path()).expect("the folder is readable");
        assert_eq!(files.count(), 1);
    }
    let output = train(&config, "1", &[]).output().expect("starts");
    assert_eq!(output.status.code(), Some(2), "a file is no folder");
    assert!(config.is_file());
    fs::remove_file(&config).expect("the folder is writable");
    let mine = folder.path().join("data.json");
    fs::write(&mine, "mine").expect("the folder is writable");
    for more in [&[][..], &["--resume"]] {
        let output = train(folder.path(), "1", more).output().expect("starts");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(
            stderr.contains("holds data.json, but no config.json of a run"),
            "{stderr}"
        );
        let files = fs::read_dir(folder.path()).expect("the folder is readable");
        assert_eq!(files.count(), 1);
        assert_eq!(fs::read_to_string(&mine).expect("still there"), "mine");
    }
}

#[test]
fn a_run_that_diverges_says_so_and_when() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let run = folder.path().join("run");
    // Weight decay alone multiplies the weights by a thousand a step.
    let output = train(&run, "9", &["--learning-rate", "1e6"])
        .output()
        .expect("starts");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(
        stderr.contains("the loss is NaN at step") && stderr.contains("--learning-rate"),
        "{stderr}"
    );
    assert!(!run.join("model.bpk").exists());
    // The last step has no loss after it.
    let last = folder.path().join("last");
    let name = last.to_string_lossy();
    let output = protohead(&[
        "train",
        "--synthetic",
        "--keywords",
        "2",
        "--voices",
        "1",
        "--tau",
        "1",
        "--epochs",
        "1",
        "--learning-rate",
        "1e6",
        "--device",
        "cpu",
        "--out",
        &name,
    ]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(
        stderr.contains("not finite after the last step"),
        "{stderr}"
    );
    assert!(!last.join("model.bpk").exists());
}

/// Evaluating a run that `damage` was done to: exit code 2, one line that contains `says`, and the folder is left as it was.
fn evaluation_refused(run: &Path, more: &[&str], says: &str) {
    let listing = || -> Vec<_> {
        let Ok(entries) = fs::read_dir(run) else {
            return Vec::new();
        };
        let mut names: Vec<_> = entries
            .map(|entry| entry.expect("the folder is readable").file_name())
            .collect();
        names.sort();
        names
    };
    let before = listing();
    let name = run.to_string_lossy();
    let output = protohead(&[&["evaluate", &name], more].concat());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{says}: {stderr}");
    assert_eq!(stderr.trim_end().lines().count(), 1, "{says}: {stderr}");
    assert!(stderr.contains(says), "{stderr} does not say {says}");
    assert!(output.stdout.is_empty(), "{says}: something on stdout");
    assert_eq!(before, listing(), "{says}: the folder changed");
}

#[test]
fn damaged_runs_get_one_line_from_evaluate_and_stay_as_they_are() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let run = folder.path().join("run");
    evaluation_refused(&run, &[], "No such file");
    let trained = train(&run, "1", &[]).output().expect("starts");
    assert!(trained.status.success());
    evaluation_refused(&run, &["--device", "abacus"], "abacus");
    evaluation_refused(&run, &["--data", "nowhere"], "takes no --data");
    evaluation_refused(&run, &["--epochs", "3"], "--epochs");

    let config = run.join("config.json");
    let sound = fs::read_to_string(&config).expect("written by train");
    for (text, says) in [
        (sound[..sound.len() / 2].to_owned(), "damaged"),
        ("not json".to_owned(), "damaged"),
        (sound.replace("\"tau\": 1", "\"tau\": \"one\""), "damaged"),
        (sound.replace("\"tau\": 1", "\"tau\": 0"), "tau is 0"),
        (sound.replace("\"tau\": 1", "\"tau\": 2"), "damaged"),
        (
            sound.replace("\"keywords\": 4", "\"keywords\": 1"),
            "keywords is 1",
        ),
        (
            sound.replace("\"keywords\": 4", "\"keywords\": 5"),
            "was trained on the keywords word00 word01 word02 word03, these are",
        ),
    ] {
        assert_ne!(text, sound, "{says}: nothing was damaged");
        fs::write(&config, text).expect("the folder is writable");
        evaluation_refused(&run, &["--device", "cpu"], says);
    }
    fs::write(&config, &sound).expect("the folder is writable");
    let data = run.join("data.json");
    let told = fs::read_to_string(&data).expect("written by train");
    fs::write(&data, told.replace("word03", "word")).expect("the folder is writable");
    evaluation_refused(&run, &["--device", "cpu"], "was trained on the keywords");
    fs::write(&data, "{}").expect("the folder is writable");
    evaluation_refused(&run, &["--device", "cpu"], "damaged");
    fs::write(&data, &told).expect("the folder is writable");

    let model = run.join("model.bpk");
    let bytes = fs::read(&model).expect("written by train");
    let mut flipped = bytes.clone();
    flipped[bytes.len() - 9] ^= 1;
    for damaged in [
        &flipped[..],
        &bytes[..0],
        &bytes[..100],
        &bytes[..bytes.len() - 7],
        b"no model",
    ] {
        fs::write(&model, damaged).expect("the folder is writable");
        evaluation_refused(&run, &["--device", "cpu"], "damaged");
    }
    fs::remove_file(&model).expect("the folder is writable");
    evaluation_refused(&run, &["--device", "cpu"], "is not finished");
}
