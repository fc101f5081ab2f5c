//! `protohead enroll`

use std::path::PathBuf;

use clap::Args;

use crate::device::DeviceName;
use crate::error::Error;
use crate::output::say;
use crate::training::classifier::Classifier;
use crate::training::run::Finished;

#[derive(Args)]
pub(crate) struct Arguments {
    /// The folder of a finished run. The keyword goes into its enrolled.json, and nothing else changes: without that file it is forgotten.
    run: PathBuf,
    /// The keyword. One that was taught before is taught anew; those that the run was trained with stay as they are.
    keyword: String,
    /// WAV files, each with the keyword in its first second. Five are a good number.
    #[arg(required = true, value_name = "WAV")]
    files: Vec<PathBuf>,
    /// auto, cpu, cuda, cuda:N or wgpu; auto is the first that works of cuda, cpu, wgpu
    #[arg(long, default_value_t = DeviceName::Auto)]
    device: DeviceName,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Error> {
    let finished = Finished::read(&arguments.run)?;
    let keyword = &arguments.keyword;
    finished.can_enroll(keyword)?;
    let devices = arguments.device.training_devices()?;
    let classifier = Classifier::new(&finished, &devices)?;
    let prototype = classifier.prototype(&arguments.files)?;
    let known = finished.enroll(keyword, prototype)?;
    say(format_args!(
        "{keyword}: from {} recordings, one of {known} keywords",
        arguments.files.len()
    ));
    Ok(())
}
