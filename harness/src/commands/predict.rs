//! `protohead predict`

use std::path::PathBuf;

use clap::Args;

use crate::device::DeviceName;
use crate::error::Error;
use crate::output::say;
use crate::training::classifier::Classifier;
use crate::training::run::Finished;

#[derive(Args)]
pub(crate) struct Arguments {
    /// The folder of a finished run.
    run: PathBuf,
    /// WAV files, each with a keyword in its first second. A line is printed per file, with tabs between: the file, the keyword, and
    /// its probability among all keywords of the run.
    #[arg(required = true, value_name = "WAV")]
    files: Vec<PathBuf>,
    /// auto, cpu, cuda, cuda:N or wgpu; auto is the first that works of cuda, cpu, wgpu
    #[arg(long, default_value_t = DeviceName::Auto)]
    device: DeviceName,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Error> {
    let finished = Finished::read(&arguments.run)?;
    let devices = arguments.device.training_devices()?;
    let classifier = Classifier::new(&finished, &devices)?;
    let predictions = classifier.predict(&arguments.files)?;
    for (file, prediction) in arguments.files.iter().zip(predictions) {
        say(format_args!(
            "{}\t{}\t{:.3}",
            file.display(),
            prediction.keyword,
            prediction.probability
        ));
    }
    Ok(())
}
