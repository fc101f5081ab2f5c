//! `protohead train` and `protohead evaluate`

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;

use crate::device::DeviceName;
use crate::error::Error;
use crate::output::say;
use crate::training::claim::Claim;
use crate::training::config::{RunConfig, Source};
use crate::training::data::{Clips, Dataset, synthetic_keywords};
use crate::training::protocol::Asked;
use crate::training::run::{Finished, Run};
use crate::training::sessions;

/// How a run goes, after the options.
const PROTOCOL: &str = "\
Of 35 keywords 20 are base classes, which are trained: the first by name, or the 20 core words if the 35 are those of Speech \
Commands. The others come in five sessions of three, of which the \
speech head knows the means of up to 5 clips each. With more keywords there are more base classes, with fewer there are fewer \
sessions, and with fewer than 7 none. --base, --ways and --shots change these numbers. The table has a line a session: accuracy in percent on the test clips of all classes so far, of the base \
classes (seen), of the others (unseen), and the harmonic mean of these two. Training is SGD with a cosine schedule, without augmentation; \
the last epoch counts.";

/// What a Speech-Commands folder is, after the options.
const FOLDER: &str = "\
A Speech-Commands folder has a folder of WAV files a keyword (PCM of 8 to 32 bits, float, A-law or mu-law, any rate and number of \
channels; the first second counts). testing_list.txt names the test clips, as <keyword>/<file>, and must be there; the base classes' \
clips in validation_list.txt, if it is there, are for the validation accuracy after each epoch, and the others in it are left out. Folders whose names begin with _ or a dot are no keywords.";

#[derive(Args)]
#[command(after_help = format!("{PROTOCOL}\n\n{FOLDER}"))]
pub(crate) struct Train {
    /// Train on a Speech-Commands folder: `DIR/<keyword>/*.wav` with `testing_list.txt`. Needed unless --synthetic.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["synthetic", "keywords", "voices"])]
    data: Option<PathBuf>,
    /// Train on synthesised keywords instead: needs no files.
    #[arg(long)]
    synthetic: bool,
    /// The folder of the run.
    #[arg(long, value_name = "RUN", default_value = "runs/latest")]
    out: PathBuf,
    /// Continue an interrupted run, with the options that it began with.
    #[arg(long)]
    resume: bool,
    /// Passes over the base classes' clips.
    #[arg(long, default_value_t = 100, allow_negative_numbers = true)]
    epochs: usize,
    /// Clips per step.
    #[arg(long, default_value_t = 128, allow_negative_numbers = true)]
    batch: usize,
    /// The encoder's width, 1 to 64: embeddings have 32 times as many columns.
    #[arg(long, default_value_t = 8, allow_negative_numbers = true)]
    tau: usize,
    /// The factor on the cosines: the inverse temperature.
    #[arg(long, default_value_t = 16.0, allow_hyphen_values = true)]
    scale: f64,
    /// In radians: what is added to the angle between an embedding and its own class in training (ArcFace).
    #[arg(long, default_value_t = 0.0, allow_hyphen_values = true)]
    angular_margin: f64,
    /// What is taken from the cosine of an embedding with its own class in training (CosFace).
    #[arg(long, default_value_t = 0.0, allow_hyphen_values = true)]
    cosine_margin: f64,
    /// The highest learning rate, before cosine decay.
    #[arg(long, default_value_t = 0.004, allow_hyphen_values = true)]
    learning_rate: f64,
    /// Momentum of SGD.
    #[arg(long, default_value_t = 0.9, allow_hyphen_values = true)]
    momentum: f64,
    /// Weight decay of SGD.
    #[arg(long, default_value_t = 0.001, allow_hyphen_values = true)]
    weight_decay: f64,
    /// Weights of the speech, the formant and the residual head's loss: 1,0,0 trains on speech alone, with both lambdas 0.
    #[arg(
        long,
        value_name = "A,B,C",
        value_delimiter = ',',
        default_value = "1,1,1",
        allow_hyphen_values = true
    )]
    head_weights: Vec<f64>,
    /// Weight of the reconstruction loss.
    #[arg(long, default_value_t = 1.0, allow_hyphen_values = true)]
    lambda: f64,
    /// Weight of the reconstruction loss over class-wise shuffled parts.
    #[arg(long, default_value_t = 1.0, allow_hyphen_values = true)]
    lambda_shuffled: f64,
    /// Seed of everything random.
    #[arg(long, default_value_t = 0, allow_negative_numbers = true)]
    seed: u64,
    /// Synthesised keywords, 2 to 200.
    #[arg(long, default_value_t = 35, allow_negative_numbers = true)]
    keywords: usize,
    /// Synthesised voices to train on, 1 to 10000.
    #[arg(long, default_value_t = 40, allow_negative_numbers = true)]
    voices: usize,
    /// Base classes: the other keywords have to be whole sessions of --ways. Without it there are up to five sessions, of three sevenths.
    #[arg(long, allow_negative_numbers = true)]
    base: Option<usize>,
    /// New classes of each incremental session.
    #[arg(long, default_value_t = Asked::default().ways, allow_negative_numbers = true)]
    ways: usize,
    /// Clips that a new class is known from; fewer if one has fewer.
    #[arg(long, default_value_t = Asked::default().shots, allow_negative_numbers = true)]
    shots: usize,
    /// auto, cpu, cuda, cuda:N or wgpu; auto is the first that works of cuda, cpu, wgpu
    #[arg(long, default_value_t = DeviceName::Auto)]
    device: DeviceName,
}

#[derive(Args)]
#[command(after_help = PROTOCOL)]
pub(crate) struct Evaluate {
    /// The folder of a finished run.
    run: PathBuf,
    /// The Speech-Commands folder, if it is not where it was in training; none for a run on synthesised keywords.
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// auto, cpu, cuda, cuda:N or wgpu; auto is the first that works of cuda, cpu, wgpu
    #[arg(long, default_value_t = DeviceName::Auto)]
    device: DeviceName,
}

/// The clips of a run, whose features its folder may keep, if their keywords and their digest are accepted.
fn dataset(
    source: &Source,
    config: &RunConfig,
    run: &Path,
    keep: bool,
    accept: impl FnOnce(&[String], Option<&str>) -> Result<(), Error>,
) -> Result<Dataset, Error> {
    let (seed, protocol) = (config.seed, config.protocol);
    match source {
        Source::Folder(folder) => {
            let clips = Clips::find(folder, seed, protocol)?;
            accept(&clips.keywords, Some(&clips.digest))?;
            Dataset::of_clips(clips, &run.join("cache"), keep)
        }
        &Source::Synthetic { keywords, voices } => {
            accept(&synthetic_keywords(keywords), None)?;
            Dataset::synthetic(seed, keywords, voices, protocol).map_err(Error::Usage)
        }
    }
}

/// Where a run's clips were, if they still are.
fn still_there(folder: &Path) -> Result<Source, Error> {
    match folder.is_dir() {
        true => Ok(Source::Folder(folder.into())),
        false => Err(Error::Content {
            path: folder.into(),
            reason: "the clips of the run are no longer there: say where they are with --data"
                .into(),
        }),
    }
}

/// What a run on these arguments is: what was not given is as in the run that is resumed, if there is one.
fn configuration(arguments: &Train, given: &dyn Fn(&str) -> bool) -> Result<RunConfig, Error> {
    let out = &arguments.out;
    let begun = match arguments.resume && out.join("config.json").exists() {
        true => Some(Run::config(out)?),
        false => None,
    };
    let source = match (&arguments.data, begun.as_ref().map(|begun| &begun.source)) {
        (Some(folder), _) => Source::Folder(fs::canonicalize(folder).map_err(Error::io(folder))?),
        (None, Some(Source::Synthetic { keywords, voices })) => Source::Synthetic {
            keywords: pick(given("keywords"), arguments.keywords, Some(*keywords)),
            voices: pick(given("voices"), arguments.voices, Some(*voices)),
        },
        (None, Some(Source::Folder(folder))) if !arguments.synthetic => {
            if given("keywords") || given("voices") {
                return Err(Error::Usage(format!(
                    "--keywords and --voices are of synthesised keywords, but the run in {} is on {}",
                    out.display(),
                    folder.display()
                )));
            }
            still_there(folder)?
        }
        (None, _) if arguments.synthetic => Source::Synthetic {
            keywords: arguments.keywords,
            voices: arguments.voices,
        },
        (None, _) if arguments.resume => {
            return Err(Error::Usage(format!(
                "no run to resume in {}",
                out.display()
            )));
        }
        (None, _) => {
            return Err(Error::Usage(
                "expected clips to train on: --data DIR, or --synthetic".into(),
            ));
        }
    };
    let begun = begun.as_ref();
    macro_rules! field {
        ($name:ident $(of $of:ident)?) => {
            pick(
                given(stringify!($name)),
                arguments.$name.clone(),
                begun.map(|begun| begun.$($of.)?$name.clone()),
            )
        };
    }
    Ok(RunConfig {
        source,
        protocol: Asked {
            base: field!(base of protocol),
            ways: field!(ways of protocol),
            shots: field!(shots of protocol),
        },
        epochs: field!(epochs),
        batch: field!(batch),
        tau: field!(tau),
        scale: field!(scale),
        angular_margin: field!(angular_margin),
        cosine_margin: field!(cosine_margin),
        learning_rate: field!(learning_rate),
        momentum: field!(momentum),
        weight_decay: field!(weight_decay),
        head_weights: field!(head_weights),
        lambda: field!(lambda),
        lambda_shuffled: field!(lambda_shuffled),
        seed: field!(seed),
        device: field!(device).resolve(),
    })
}

fn pick<T>(given: bool, argument: T, begun: Option<T>) -> T {
    match begun {
        Some(begun) if !given => begun,
        _ => argument,
    }
}

/// Trains; `given` says whether an option was on the command line, by its field's name.
pub(crate) fn train(arguments: &Train, given: &dyn Fn(&str) -> bool) -> Result<(), Error> {
    let config = configuration(arguments, given)?;
    config
        .validate()
        .map_err(|reason| Error::Usage(format!("--{reason}")))?;
    let devices = config.device.training_devices()?;
    if arguments.resume && !arguments.out.join("config.json").exists() {
        let out = arguments.out.display();
        say(format_args!("{out} holds no run yet: it begins there"));
    }
    let claim = Claim::new(&arguments.out, &config, arguments.resume)?;
    say(format_args!(
        "seed {}, {}: preparing the clips",
        config.seed, config.device
    ));
    let accept = |keywords: &[String], clips: Option<&str>| claim.accept(keywords, clips);
    let mut data = dataset(&config.source, &config, &arguments.out, true, accept)?;
    let device = config.device;
    let run = claim.begin(config, &mut data)?;
    let protocol = data.protocol;
    say(format_args!(
        "{} keywords: {} base classes, {} sessions of {} with {} shots; {} training, {} validation and {} test clips",
        data.keywords.len(),
        protocol.base,
        protocol.sessions,
        protocol.ways,
        protocol.shots,
        data.train.len(),
        data.validation.len(),
        data.test.len()
    ));
    if device != DeviceName::Cpu {
        say(format_args!(
            "{device}: the first steps compile and tune the network's kernels, which can take minutes"
        ));
    }
    sessions::print(&run.train(&data, &devices)?);
    Ok(())
}

pub(crate) fn evaluate(arguments: &Evaluate) -> Result<(), Error> {
    let finished = Finished::read(&arguments.run)?;
    let config = finished.config();
    let source = match (&config.source, &arguments.data) {
        (Source::Folder(_), Some(folder)) => Source::Folder(folder.clone()),
        (Source::Synthetic { .. }, Some(_)) => {
            return Err(Error::Usage(
                "this run was trained on synthesised keywords: it takes no --data".into(),
            ));
        }
        (Source::Folder(folder), None) => still_there(folder)?,
        (source, None) => source.clone(),
    };
    let devices = arguments.device.training_devices()?;
    let accept = |keywords: &[String], clips: Option<&str>| finished.accept(keywords, clips);
    let mut data = dataset(&source, config, &arguments.run, false, accept)?;
    sessions::print(&finished.evaluate(&mut data, &devices)?);
    Ok(())
}
