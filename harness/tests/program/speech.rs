//! Training on speech that espeak-ng makes: real files, in voices of which some are only heard in the test.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

use crate::training::{Trained, same_bytes};

fn succeeds(mut command: Command) -> Output {
    let output = command.output().expect("it starts");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {stderr}");
    output
}

/// Whether espeak-ng is here, which a user without rights cannot install; CI has it.
fn can_speak() -> bool {
    let is_here = Command::new("espeak-ng").arg("--version").output().is_ok();
    assert!(
        is_here || std::env::var_os("CI").is_none(),
        "no espeak-ng: scripts/setup.sh --tests should have installed it"
    );
    if !is_here {
        // Past the harness, which keeps what passing tests print.
        let told = "protohead tests: no espeak-ng, so nothing is trained on speech";
        let _ = writeln!(std::io::stderr(), "{told}");
    }
    is_here
}

/// A Speech-Commands folder with all keywords and voices, and one clip of each.
fn speech(data: &Path) -> Command {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/make-speech.sh");
    let mut command = Command::new(script);
    command.arg(data).arg("1");
    command
}

fn train(data: &Path, out: &Path, epochs: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_protohead"));
    command
        .args(["train", "--device", "cpu", "--tau", "1", "--batch", "12"])
        .args(["--epochs", epochs, "--data"])
        .arg(data)
        .arg("--out")
        .arg(out);
    command
}

#[test]
fn keywords_of_voices_not_heard_in_training_are_recognised() {
    if !can_speak() {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let [data, run] = ["speech", "run"].map(|name| folder.path().join(name));
    succeeds(speech(&data));
    succeeds(train(&data, &run, "18"));
    let table = std::fs::read(run.join("accuracy.json")).expect("written by train");
    let table: Value = serde_json::from_slice(&table).expect("written as JSON");
    let accuracy = |session: usize, of: &str| table[session][of].as_f64().unwrap_or(0.0);
    let base = accuracy(0, "all");
    assert!(base >= 90.0, "base accuracy {base}: {table}");
    // Three voices of eight classes, by the trained class weights: chance is one in eight.
    let metrics = std::fs::read_to_string(run.join("metrics.jsonl")).expect("written by train");
    let last = metrics.lines().last().expect("a line an epoch");
    let last: Value = serde_json::from_str(last).expect("written as JSON");
    let validation = last["validation_accuracy"].as_f64().unwrap_or(0.0);
    assert!(validation >= 80.0, "{last}");
    // Three classes a session are known from five clips each. Where their class weights were not replaced, or others were, they are
    // recognised by chance: one in fourteen.
    assert_eq!(table.as_array().map(Vec::len), Some(3), "{table}");
    for session in [1, 2] {
        let [seen, unseen] = ["seen", "unseen"].map(|of| accuracy(session, of));
        assert!(seen >= 75.0 && unseen >= 60.0, "session {session}: {table}");
    }

    // What `predict` says of the test clips is what the last session counted.
    let list = std::fs::read_to_string(data.join("testing_list.txt")).expect("made by the script");
    let mut predict = Command::new(env!("CARGO_BIN_EXE_protohead"));
    predict.arg("predict").arg(&run).args(["--device", "cpu"]);
    predict.args(list.lines()).current_dir(&data);
    let output = succeeds(predict);
    let said = String::from_utf8_lossy(&output.stdout);
    let right = said.lines().filter(|line| {
        let fields: Vec<&str> = line.split('\t').collect();
        fields[0].starts_with(&format!("{}/", fields[1]))
    });
    let share = 100.0 * right.count() as f64 / list.lines().count() as f64;
    assert_eq!(share, accuracy(2, "all"), "{said}");

    // A word that was in no session is taught by five voices, and known in six others.
    let spoken = |voice: &str| {
        let wav = folder.path().join(format!("hello-{voice}.wav"));
        let mut speak = Command::new("espeak-ng");
        speak.args(["-v", voice, "-w"]).arg(&wav).arg("hello");
        succeeds(speak);
        wav
    };
    let by_run = |command: &str, words: &[&str], files: Vec<PathBuf>| {
        let mut program = Command::new(env!("CARGO_BIN_EXE_protohead"));
        program.arg(command).arg(&run).args(words).args(files);
        program.args(["--device", "cpu"]);
        let output = succeeds(program);
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let five = [
        "en-us+m1",
        "en-us+f2",
        "en-gb+m3",
        "en-us+f1",
        "en-gb-scotland+f1",
    ];
    let said = by_run("enroll", &["hello"], five.map(spoken).into());
    assert_eq!(said, "hello: from 5 recordings, one of 15 keywords\n");
    let others = [
        "en-us+m7",
        "en-us+f4",
        "en-gb+m6",
        "en-gb+f5",
        "en-gb-scotland+m8",
        "en-us+klatt2",
    ];
    let said = by_run("predict", &[], others.map(spoken).into());
    let known = said.lines().filter(|line| line.contains("\thello\t"));
    assert!(known.count() >= 4, "chance is one in fifteen: {said}");
}

#[test]
fn training_on_files_that_was_killed_resumes_to_the_same_weights_to_the_bit() {
    if !can_speak() {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let [data, straight, broken] =
        ["speech", "straight", "broken"].map(|name| folder.path().join(name));
    succeeds(speech(&data));
    succeeds(train(&data, &straight, "3"));
    let begun = train(&data, &broken, "3");
    drop(Trained::until(begun, &broken.join("metrics.jsonl")));
    assert!(
        !broken.join("accuracy.json").exists(),
        "it was killed too late"
    );
    let mut resume = Command::new(env!("CARGO_BIN_EXE_protohead"));
    resume.args(["train", "--resume", "--out"]).arg(&broken);
    succeeds(resume);
    same_bytes(&straight, &broken);
}

#[test]
fn a_list_of_other_clips_is_not_overwritten() {
    if !can_speak() {
        return;
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let official = "right/bb05582b_nohash_3.wav\n";
    for list in ["testing_list.txt", "validation_list.txt"] {
        let list = folder.path().join(list);
        std::fs::write(&list, official).expect("the folder is writable");
        let output = speech(folder.path()).output().expect("it starts");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(stderr.contains("bb05582b_nohash_3.wav"), "{stderr}");
        let left = std::fs::read_to_string(&list).expect("it is still there");
        assert_eq!(left, official);
        let files = std::fs::read_dir(folder.path()).expect("a folder").count();
        assert_eq!(files, 1, "something was made beside the list");
        std::fs::remove_file(&list).expect("the folder is writable");
    }
}
