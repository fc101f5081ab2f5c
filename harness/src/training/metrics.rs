//! The metrics of a run's epochs, as lines and as a picture.

use std::path::Path;

use plotters::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::files::write_atomically;

/// One line of the metrics.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct EpochMetrics {
    pub epoch: usize,
    pub learning_rate: f32,
    /// What is minimized.
    pub loss: f32,
    /// The loss of each head, without its weight.
    pub speech: f32,
    pub formant: f32,
    pub residual: f32,
    /// The reconstruction terms, without their weights.
    pub reconstruction: f32,
    pub reconstruction_shuffled: f32,
    /// Of the training clips as they were trained on, in percent.
    pub accuracy: f32,
    /// Of the validation clips after the epoch, in percent; null without such clips.
    pub validation_accuracy: Option<f32>,
}

/// Writes them as JSON, a line an epoch.
pub(crate) fn write_lines(path: &Path, metrics: &[EpochMetrics]) -> Result<(), Error> {
    let mut lines = Vec::new();
    for line in metrics {
        serde_json::to_writer(&mut lines, line).map_err(Error::unwritable(path))?;
        lines.push(b'\n');
    }
    write_atomically(path, &lines)
}

/// Draws loss and accuracy over the epochs.
pub(crate) fn draw(path: &Path, metrics: &[EpochMetrics]) -> Result<(), Error> {
    let mut picture = String::new();
    {
        let area = SVGBackend::with_string(&mut picture, (800, 600)).into_drawing_area();
        plot(&area, metrics).map_err(Error::unwritable(path))?;
    }
    write_atomically(path, picture.as_bytes())
}

fn plot(
    area: &DrawingArea<SVGBackend, plotters::coord::Shift>,
    metrics: &[EpochMetrics],
) -> Result<(), Box<dyn std::error::Error>> {
    area.fill(&WHITE)?;
    let loss: Vec<_> = points(metrics, |m| Some(m.loss));
    let accuracy = points(metrics, |m| Some(m.accuracy));
    let validation = points(metrics, |m| m.validation_accuracy);
    let highest = loss.iter().map(|&(_, loss)| loss).fold(0.1, f64::max);
    let panels = area.split_evenly((2, 1));
    panel(&panels[0], "loss", metrics.len(), highest, [(BLUE, &loss)])?;
    let (name, shown) = match validation.is_empty() {
        true => ("training accuracy, %", vec![(BLUE, &accuracy)]),
        false => (
            "accuracy, %: training (blue), validation (red)",
            vec![(BLUE, &accuracy), (RED, &validation)],
        ),
    };
    panel(&panels[1], name, metrics.len(), 100.0, shown)?;
    area.present()?;
    Ok(())
}

fn points(metrics: &[EpochMetrics], value: fn(&EpochMetrics) -> Option<f32>) -> Vec<(f64, f64)> {
    let point = |m: &EpochMetrics| Some((m.epoch as f64, f64::from(value(m)?)));
    metrics.iter().filter_map(point).collect()
}

fn panel<'a>(
    area: &DrawingArea<SVGBackend, plotters::coord::Shift>,
    name: &str,
    epochs: usize,
    top: f64,
    lines: impl IntoIterator<Item = (RGBColor, &'a Vec<(f64, f64)>)>,
) -> Result<(), Box<dyn std::error::Error>> {
    let mut chart = ChartBuilder::on(area)
        .caption(name, ("sans-serif", 18))
        .margin(10)
        .x_label_area_size(30)
        .y_label_area_size(50)
        .build_cartesian_2d(0.0..epochs.max(1) as f64, 0.0..top)?;
    chart.configure_mesh().x_desc("epoch").draw()?;
    for (color, points) in lines {
        // With a dot each, as a line of one epoch has no length.
        let line = LineSeries::new(points.iter().copied(), color.filled()).point_size(2);
        chart.draw_series(line)?;
    }
    Ok(())
}
