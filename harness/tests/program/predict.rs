//! `protohead predict` of a run on synthesised keywords: what it prints, and what it refuses. Its answers are checked on speech.

use std::fs;
#[cfg(target_os = "linux")]
use std::io::Write;
use std::path::Path;
#[cfg(target_os = "linux")]
use std::process::{Command, Stdio};

use crate::protohead;
use crate::training::train;

fn write_wav(path: &Path, sample: impl Fn(usize) -> i16) {
    let spec = hound::WavSpec {
        channels: 1,
        sample_rate: 16_000,
        bits_per_sample: 16,
        sample_format: hound::SampleFormat::Int,
    };
    let mut writer = hound::WavWriter::create(path, spec).expect("the folder is writable");
    for i in 0..16_000 {
        writer
            .write_sample(sample(i))
            .expect("the folder is writable");
    }
    writer.finalize().expect("the folder is writable");
}

#[test]
fn predict_prints_a_line_per_file_and_refuses_what_is_damaged() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let [run, tone, noise, text] =
        ["run", "tone.wav", "noise.wav", "text.wav"].map(|name| folder.path().join(name));
    write_wav(&tone, |i| ((i as f32 * 0.1).sin() * 8000.0) as i16);
    write_wav(&noise, |i| (i * i * 7919 % 16_001) as i16 - 8000);
    fs::write(&text, "no sound").expect("the folder is writable");
    let [run_name, tone, noise, text] =
        [&run, &tone, &noise, &text].map(|path| path.to_string_lossy().into_owned());
    let predict =
        |files: &[&str]| protohead(&[&["predict", &run_name, "--device", "cpu"], files].concat());
    let refused = |files: &[&str], says: &str| {
        let output = predict(files);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{says}: {stderr}");
        assert_eq!(stderr.trim_end().lines().count(), 1, "{says}: {stderr}");
        assert!(stderr.contains(says), "{stderr} does not say {says}");
        assert!(output.stdout.is_empty(), "{says}: something on stdout");
    };
    refused(&[&tone], "No such file");
    let trained = train(&run, "1", &[]).output().expect("starts");
    assert!(trained.status.success(), "{trained:?}");

    let output = predict(&[&tone, &noise, &tone]);
    let stdout = String::from_utf8_lossy(&output.stdout);
    let lines: Vec<Vec<&str>> = stdout.lines().map(|l| l.split('\t').collect()).collect();
    assert_eq!(lines.len(), 3, "{output:?}");
    for (line, file) in lines.iter().zip([&tone, &noise, &tone]) {
        let &[name, keyword, probability] = &line[..] else {
            panic!("{stdout}")
        };
        assert_eq!(name, file);
        let of_the_run = ["word00", "word01", "word02", "word03"];
        assert!(of_the_run.contains(&keyword), "{stdout}");
        let probability: f64 = probability.parse().expect("a number");
        // The highest of four.
        assert!((0.25..=1.0).contains(&probability), "{stdout}");
    }
    assert_eq!(lines[0], lines[2]);

    #[cfg(target_os = "linux")]
    {
        let mut piped = Command::new(env!("CARGO_BIN_EXE_protohead"))
            .args(["predict", &run_name, "--device", "cpu", "/dev/stdin"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts");
        let sound = fs::read(&tone).expect("written above");
        let mut stdin = piped.stdin.take().expect("a pipe");
        stdin.write_all(&sound).expect("it is read to its end");
        drop(stdin);
        let output = piped.wait_with_output().expect("it ends");
        let stdout = String::from_utf8_lossy(&output.stdout);
        let answer: Vec<&str> = stdout.trim_end().split('\t').collect();
        assert_eq!(answer, [&["/dev/stdin"], &lines[0][1..]].concat());
    }

    refused(&[], "WAV");
    refused(&["nowhere.wav"], "No such file");
    keywords_are_taught(&run, [&tone, &noise, &text]);
    // The others are predicted all the same.
    let output = predict(&[&text, &tone, "nowhere.wav", &noise]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let some = String::from_utf8_lossy(&output.stdout);
    let answers: Vec<&str> = stdout.lines().take(2).collect();
    assert_eq!(some.lines().collect::<Vec<_>>(), answers);
    let stderr = String::from_utf8_lossy(&output.stderr);
    let complaints: Vec<&str> = stderr.lines().collect();
    let [of_text, of_nowhere] = complaints[..] else {
        panic!("{stderr}")
    };
    assert!(of_text.contains("no WAV file that is read"), "{stderr}");
    assert!(of_nowhere.contains("No such file"), "{stderr}");
    let damage = |name: &str, damaged: &dyn Fn(&str) -> Vec<u8>, says: &str| {
        let path = run.join(name);
        let sound = fs::read(&path).expect("written by train");
        let text = String::from_utf8_lossy(&sound);
        fs::write(&path, damaged(&text)).expect("the folder is writable");
        refused(&[&tone], says);
        fs::write(&path, &sound).expect("the folder is writable");
    };
    let prototypes = "prototypes.safetensors";
    damage(
        prototypes,
        &|_| b"none".into(),
        "not those that were written",
    );
    let with = |text: &str, change: &dyn Fn(&mut serde_json::Value)| {
        let mut data: serde_json::Value = serde_json::from_str(text).expect("JSON");
        change(&mut data);
        data.to_string().into_bytes()
    };
    let other_features = |text: &str| with(text, &|data| data["probe"][0][0] = 1.0.into());
    let other_network = |text: &str| with(text, &|data| data["version"] = 1_000.into());
    let older = |text: &str| {
        with(text, &|data| {
            data.as_object_mut().expect("an object").remove("probe");
        })
    };
    let of_another = "another version of protohead";
    damage("data.json", &other_features, of_another);
    damage("data.json", &other_network, of_another);
    damage("data.json", &older, of_another);
    let unscaled = |text: &str| with(text, &|data| data["scaling"][0][1] = 0.0.into());
    damage("data.json", &unscaled, "damaged");
    let hidden = run.join("hidden");
    fs::rename(run.join(prototypes), &hidden).expect("the folder is writable");
    refused(&[&tone], "is not finished");
    fs::rename(&hidden, run.join(prototypes)).expect("the folder is writable");
    let resumed = {
        let path = run.join("data.json");
        let sound = fs::read_to_string(&path).expect("written by train");
        fs::write(&path, other_features(&sound)).expect("the folder is writable");
        train(&run, "1", &["--resume"]).output().expect("starts")
    };
    let stderr = String::from_utf8_lossy(&resumed.stderr);
    assert!(stderr.contains(of_another), "{stderr}");
}

/// A tone and a noise become keywords of a run on synthesised words.
fn keywords_are_taught(run: &Path, [tone, noise, text]: [&String; 3]) {
    let run_name = run.to_string_lossy();
    let by_run = |command: &str, words: &[&str]| {
        let output = protohead(&[&[command, &run_name, "--device", "cpu"], words].concat());
        let [said, told] =
            [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text).into_owned());
        (output.status.code(), said, told)
    };
    let enrolled = run.join("enrolled.json");
    let before = by_run("predict", &[tone, noise]);
    for (words, says) in [
        (
            &["word00", tone] as &[&str],
            "the run was trained with word00",
        ),
        (&["", tone], "no keyword"),
        (&["two\twords", tone], "no keyword"),
        (&[" ", tone], "no keyword"),
        (&[tone, noise], "expected a keyword before the files"),
        (&["gone.wav", noise], "expected a keyword before the files"),
        (&["tone", "nowhere.wav"], "No such file"),
        (&["tone", tone, text], "no WAV file"),
        (&["tone"], "WAV"),
    ] {
        let (code, said, told) = by_run("enroll", words);
        assert_eq!((code, told.lines().count()), (Some(2), 1), "{told}");
        assert!(told.contains(says) && said.is_empty(), "{told}");
        assert!(!enrolled.exists(), "{words:?} left something");
    }
    assert_eq!(by_run("predict", &[tone, noise]), before);

    let taught = |keyword: &str, files: &[&str], known: usize| {
        let (code, said, told) = by_run("enroll", &[&[keyword], files].concat());
        assert_eq!(code, Some(0), "{told}");
        let recordings = files.len();
        assert_eq!(
            said,
            format!("{keyword}: from {recordings} recordings, one of {known} keywords\n")
        );
    };
    let prototype = |keyword: &str| {
        let file = fs::read(&enrolled).expect("written by enroll");
        let file: serde_json::Value = serde_json::from_slice(&file).expect("JSON");
        let numbers = file["prototypes"][keyword].as_array().cloned();
        numbers.unwrap_or_else(|| panic!("no prototype of {keyword} in {file}"))
    };
    taught("a tone", &[tone], 5);
    taught("noise", &[noise, tone], 6);
    let of_tone = prototype("a tone");
    assert!(of_tone.len() > 1 && of_tone != prototype("noise"));
    // What is taught again takes the place of what was, and leaves the others.
    taught("noise", &[tone], 6);
    assert_eq!(
        [prototype("a tone"), prototype("noise")],
        [of_tone.clone(), of_tone]
    );
    // Two of six have the very embedding.
    let (_, said, _) = by_run("predict", &[tone]);
    let fields: Vec<&str> = said.trim_end().split('\t').collect();
    let probability: f64 = fields[2].parse().expect("a number");
    assert!((0.16..=0.5).contains(&probability), "{said}");
    let (code, table, told) = by_run("evaluate", &[]);
    assert_eq!(code, Some(0), "{told}");
    assert_eq!(
        table.lines().count(),
        2,
        "of the keywords it was trained with"
    );

    // Nor are keywords lost, of others who teach.
    let lock = fs::File::open(run).expect("it is there");
    lock.lock().expect("nobody else has it");
    let (code, _, told) = by_run("enroll", &["other", tone]);
    assert_eq!((code, told.lines().count()), (Some(2), 1), "{told}");
    assert!(told.contains("another process"), "{told}");
    drop(lock);

    let sound = fs::read_to_string(&enrolled).expect("written by enroll");
    // Of another network, they take no part, and those that are taught then take their places.
    let of_another = sound.replacen("blake3\": \"", "blake3\": \"0", 1);
    fs::write(&enrolled, of_another).expect("the folder is writable");
    let (code, said, told) = by_run("predict", &[tone, noise]);
    assert_eq!((code, &said), (Some(0), &before.1), "{told}");
    assert!(told.contains("another network"), "{told}");
    let (code, said, told) = by_run("enroll", &["only", tone]);
    assert_eq!(code, Some(0), "{told}");
    assert!(said.ends_with("one of 5 keywords\n"), "{said}");
    for (damaged, says) in [
        (
            sound.replacen("\"a tone\": [", "\"a tone\": [ 1.0,", 1),
            "damaged",
        ),
        (sound[1..].to_owned(), "damaged"),
    ] {
        fs::write(&enrolled, damaged).expect("the folder is writable");
        for words in [
            ("predict", &[tone as &str] as &[&str]),
            ("enroll", &["tone", tone]),
        ] {
            let (code, _, told) = by_run(words.0, words.1);
            assert_eq!((code, told.lines().count()), (Some(2), 1), "{told}");
            assert!(told.contains(says), "{told} does not say {says}");
        }
    }
    fs::remove_file(&enrolled).expect("the folder is writable");
    assert_eq!(by_run("predict", &[tone, noise]), before);
}
