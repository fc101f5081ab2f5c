//! Records whose bytes depend on nothing but their values. Burn names every parameter by a random number and writes an
//! optimizer's states in the order of a hash table; here the number is the parameter's place among the model's paths.

use std::collections::BTreeMap;

use burn::optim::ModuleOptimizer;
use burn::store::{ModuleRecord, RecordError};
use burn::tensor::Bytes;
use burn_pack::{Reader, Writer};

/// The place of each parameter by the number that Burn gave it.
pub(crate) struct Places(BTreeMap<u64, u64>);

/// A model's record as a burnpack file, and what its optimizer's needs to know of it.
pub(crate) fn model(record: ModuleRecord) -> Result<(Bytes, Places), RecordError> {
    let bytes = record.into_bytes()?;
    let tensors = Reader::from_bytes(bytes.clone())?.into_tensors()?;
    let by_path: BTreeMap<_, _> = tensors.iter().map(|t| (&t.name, t.param_id)).collect();
    let places = (1..)
        .zip(by_path.into_values().flatten())
        .map(|(place, number)| (number, place))
        .collect();
    let places = Places(places);
    Ok((places.renumber(bytes)?, places))
}

/// The state of an optimizer as a burnpack file.
pub(crate) fn optimizer(
    optimizer: &ModuleOptimizer,
    places: &Places,
) -> Result<Bytes, RecordError> {
    places.renumber(optimizer.into_bytes()?)
}

impl Places {
    fn renumber(&self, bytes: Bytes) -> Result<Bytes, RecordError> {
        let reader = Reader::from_bytes(bytes)?;
        let (scalars, metadata) = (reader.scalars().clone(), reader.metadata().clone());
        let mut tensors = reader.into_tensors()?;
        for tensor in &mut tensors {
            tensor.name = self.rename(&tensor.name);
            tensor.param_id = tensor.param_id.and_then(|id| self.0.get(&id).copied());
        }
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        let mut writer = Writer::new(tensors);
        for (name, value) in &scalars {
            writer = writer.with_scalar(&self.rename(name), *value);
        }
        for (name, value) in &metadata {
            writer = writer.with_metadata(&self.rename(name), value);
        }
        Ok(writer.into_bytes()?)
    }

    /// An optimizer names its states `number.field`, a model its tensors by path.
    fn rename(&self, name: &str) -> String {
        let (number, field) = name.split_at(name.find('.').unwrap_or(name.len()));
        match number.parse().ok().and_then(|n: u64| self.0.get(&n)) {
            Some(place) => format!("{place}{field}"),
            None => name.to_owned(),
        }
    }
}
