//! `protohead predict`

use std::path::PathBuf;

use clap::Args;

use crate::device::DeviceName;
use crate::error::Error;
use crate::output::{complain, say};
use crate::training::classifier::{Classifier, Prediction};
use crate::training::run::Finished;

#[derive(Args)]
pub(crate) struct Arguments {
    /// The folder of a finished run.
    run: PathBuf,
    /// WAV files, each with a keyword in its first second. A line is printed per file, with tabs between: the file, the keyword, and
    /// its probability among all keywords of the run and those that `enroll` taught it. A file that cannot be read gets its line on
    /// standard error, and the exit code is 2.
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
    let mut refused = None;
    let predicted = classifier.predict(&arguments.files, |file, prediction| match prediction {
        Ok(Prediction {
            keyword,
            probability,
        }) => say(format_args!(
            "{}\t{keyword}\t{probability:.3}",
            file.display()
        )),
        // The last one is told of by whoever gets it.
        Err(error) => {
            if let Some(before) = refused.replace(error) {
                complain(before);
            }
        }
    });
    match (refused, predicted) {
        (Some(refused), Ok(())) => Err(refused),
        (Some(refused), Err(error)) => {
            complain(refused);
            Err(error)
        }
        (None, predicted) => predicted,
    }
}
