//! Training on speech that espeak-ng makes: real files, in voices of which some are only heard in the test.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::protohead;

#[test]
fn keywords_of_voices_not_heard_in_training_are_recognised() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let [data, run] = ["speech", "run"].map(|name| folder.path().join(name));
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/make-speech.sh");
    let made = Command::new(&script)
        .arg(&data)
        .arg("1")
        .output()
        .expect("the script starts");
    assert!(
        made.status.success(),
        "{}",
        String::from_utf8_lossy(&made.stderr)
    );
    let [data, run_name] = [&data, &run].map(|path| path.to_string_lossy().into_owned());
    let trained = protohead(&[
        "train", "--data", &data, "--out", &run_name, "--tau", "1", "--batch", "12", "--epochs",
        "18", "--device", "cpu",
    ]);
    assert!(
        trained.status.success(),
        "{}",
        String::from_utf8_lossy(&trained.stderr)
    );
    let table = std::fs::read(run.join("accuracy.json")).expect("written by train");
    let table: Value = serde_json::from_slice(&table).expect("written as JSON");
    let base = table[0]["all"]
        .as_f64()
        .expect("the base session has an accuracy");
    assert!(base >= 90.0, "base accuracy {base}: {table}");
}
