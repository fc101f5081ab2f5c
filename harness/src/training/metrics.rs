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
    pub loss: f32,
    pub classification: f32,
    pub reconstruction: f32,
    pub accuracy: f32,
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
    let highest = metrics
        .iter()
        .map(|m| f64::from(m.loss))
        .fold(0.1, f64::max);
    for (half, name, top, value) in [
        (
            0,
            "loss",
            highest,
            (|m| f64::from(m.loss)) as fn(&EpochMetrics) -> f64,
        ),
        (1, "training accuracy, %", 100.0, |m| f64::from(m.accuracy)),
    ] {
        let panels = area.split_evenly((2, 1));
        let mut chart = ChartBuilder::on(&panels[half])
            .caption(name, ("sans-serif", 18))
            .margin(10)
            .x_label_area_size(30)
            .y_label_area_size(50)
            .build_cartesian_2d(0.0..metrics.len().max(1) as f64, 0.0..top)?;
        chart.configure_mesh().x_desc("epoch").draw()?;
        let points = metrics.iter().map(|m| (m.epoch as f64, value(m)));
        // With a dot each, as a line of one epoch has no length.
        chart.draw_series(LineSeries::new(points, BLUE.filled()).point_size(2))?;
    }
    area.present()?;
    Ok(())
}
