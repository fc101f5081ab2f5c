//! A step is planned and launched.

use cubecl::prelude::*;
use cubecl::std::tensor::TensorHandle;

use super::cut::{HostPlan, Problem};
use super::phases::Phases;
use super::step;
use crate::Gradients;
use crate::cosine_cross_entropy::launch::{Call, Results};
use crate::error::Error;
use crate::loss::Reduction;
use crate::loss::arriving::Arriving;
use crate::loss::target::label_rule;
use crate::memory::{empty, memory_beside};
use crate::operand::{F32, addressable, whole};

/// What becomes of the rows' losses.
pub(in crate::cosine_cross_entropy) enum Outcome<'a> {
    /// They are computed, and go here.
    Written(&'a Results),
    /// They were computed before, and left this lse, `[2, heads, rows]`.
    Saved(&'a TensorHandle),
}

/// A launch that was planned.
pub(in crate::cosine_cross_entropy) struct Step<'a> {
    call: &'a Call<'a>,
    arriving: &'a Arriving,
    gradients: &'a Gradients,
    phases: Phases,
    host: HostPlan,
}

impl<'a> Step<'a> {
    /// Plans the loss or the gradients.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if what each unit needs at least passes 32-bit addresses.
    pub(in crate::cosine_cross_entropy) fn alone(
        call: &'a Call,
        loss: bool,
        arriving: Option<&'a Arriving>,
        gradients: &'a Gradients,
    ) -> Result<Self, Error> {
        let Some(step) = Self::new(call, loss, arriving, gradients)? else {
            unreachable!("one pass keeps no exponentials, and so is always planned")
        };
        Ok(step)
    }

    /// Plans both; none if they are better done in two launches.
    ///
    /// # Errors
    /// As [`alone`](Self::alone).
    pub(in crate::cosine_cross_entropy) fn at_once(
        call: &'a Call,
        arriving: &'a Arriving,
        gradients: &'a Gradients,
    ) -> Result<Option<Self>, Error> {
        Self::new(call, true, Some(arriving), gradients)
    }

    fn new(
        call: &'a Call,
        loss: bool,
        arriving: Option<&'a Arriving>,
        gradients: &'a Gradients,
    ) -> Result<Option<Self>, Error> {
        let sizes = &call.problem.sizes;
        let arriving = Arriving::or_nothing(arriving);
        let phases = Phases {
            loss,
            embeddings: gradients.embeddings.is_some(),
            weights: gradients.weights.is_some(),
            scale: gradients.scale.is_some(),
            arrives: arriving.arrives,
            mean: call.options.loss.reduction == Reduction::Mean,
            smooth: call.options.loss.label_smoothing != 0.0,
            weighted: call.head_weights.is_some(),
            margin: !call.options.margin.is_none(),
        };
        let problem = Problem {
            heads: sizes.heads,
            rows: sizes.rows,
            active: sizes.active,
            stored: call.problem.classes,
            dim: sizes.dim,
            units: call.blueprint.units,
            lanes: call.blueprint.lanes,
            tile_rows: call.blueprint.tile_rows,
            bytes: call.problem.embeddings.dtype().size(),
        };
        let Some(host) = HostPlan::new(&problem, phases) else {
            return Ok(None);
        };
        addressable("the workspace", host.floats as u128)?;
        Ok(Some(Self {
            call,
            arriving,
            gradients,
            phases,
            host,
        }))
    }

    /// Launches it.
    pub(in crate::cosine_cross_entropy) fn launch(&self, outcome: &Outcome) {
        let call = self.call;
        let client = call.client;
        let blueprint = &call.blueprint;
        let sizes = &call.problem.sizes;
        let (embeddings, weights) = (&call.problem.embeddings, &call.problem.weights);
        let loss = &call.options.loss;
        let (count, dim) = blueprint.unit_grid(client);
        let vector = call.problem.vector_size(blueprint);
        let bytes = self.host.floats * size_of::<f32>();
        let workspace = memory_beside(client, bytes, call.problem.largest_operand());
        let rows_padded = self.host.plan.panels * blueprint.tile();
        let bests = self.host.plan.chunk_items * blueprint.tile();
        let targets = client.empty(rows_padded * size_of::<u32>());
        let scale_rows = self.gradients.scale.as_ref().map(|_| {
            let shape = [sizes.heads, sizes.rows];
            empty(client, shape, F32)
        });
        // SAFETY: the call allocated what is there. A phase that does not run touches none of its buffers, so any buffer will do for them.
        let optional = |tensor: Option<&TensorHandle>, vector| unsafe {
            match tensor {
                Some(tensor) => whole(tensor, vector),
                None => BufferArg::from_raw_parts(workspace.clone(), 1),
            }
        };
        let written = |tensor: fn(&Results) -> &TensorHandle| match outcome {
            Outcome::Written(results) => optional(Some(tensor(results)), 1),
            Outcome::Saved(_) => optional(None, 1),
        };
        let lse = match outcome {
            Outcome::Written(results) => &results.rows.lse,
            Outcome::Saved(lse) => lse,
        };
        // SAFETY: `Strided` and `Labels` proved their tensors, `Results` and the gradients have the shapes of their
        // comments, and the plan divides a workspace of as many floats as it was made for.
        unsafe {
            step::launch_unchecked(
                client,
                count,
                dim,
                blueprint.lanes,
                vector,
                blueprint.lanes * size_of::<f32>() / embeddings.dtype().size(),
                embeddings.buffer_arg(vector),
                embeddings.strides_arg(vector),
                weights.buffer_arg(vector),
                weights.strides_arg(vector),
                call.labels.buffer_arg(),
                BufferArg::from_raw_parts(targets, rows_padded),
                BufferArg::from_raw_parts(client.empty(bests * size_of::<u32>()), bests),
                self.arriving.buffer_arg(&workspace),
                match &call.head_weights {
                    Some(weights) => BufferArg::from_raw_parts(weights.clone(), sizes.heads),
                    None => optional(None, 1),
                },
                BufferArg::from_raw_parts(workspace.clone(), self.host.floats),
                written(|results| &results.rows.loss),
                whole(lse, 1),
                written(|results| &results.rows.predictions),
                written(|results| &results.reduced.loss),
                written(|results| &results.reduced.total),
                written(|results| &results.reduced.status),
                optional(self.gradients.embeddings.as_ref(), vector),
                optional(self.gradients.weights.as_ref(), vector),
                optional(scale_rows.as_ref(), 1),
                optional(self.gradients.scale.as_ref(), 1),
                self.host.plan.launch_arg(),
                label_rule(call.labels.dtype(), sizes.active, loss.ignore_index),
                call.options.scale,
                loss.label_smoothing,
                call.options.margin.launch_arg(F32),
                self.arriving.everywhere,
                self.phases,
                blueprint.units,
                self.host.in_gradient,
                blueprint.tile_rows,
                embeddings.dtype(),
                call.labels.dtype(),
            );
        }
    }
}
