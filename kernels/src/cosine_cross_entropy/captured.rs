//! A step that is recorded once and replayed.

use std::fmt;
use std::marker::PhantomData;

use cubecl::client::{Client, Graph};
use cubecl::future::block_on;
use cubecl::server::Handle;

use super::launch::{Call, Inputs, Options, forward_backward};
use crate::error::Error;
use crate::gradients::{Gradients, Wanted};
use crate::loss::{LossOutput, Upstream};

/// A [`forward_backward`] that is recorded once and replayed over the same buffers, so that the host does not launch each kernel
/// again: on CUDA a replay is one graph launch, on wgpu prepared dispatches. On a device that records no graphs, such as a
/// CPU, a replay is the ordinary call.
///
/// Write new embeddings, weights or labels into the handles of [`inputs`](Self::inputs) before a replay; the options, and with them the
/// scale, stay. After it, call [`output`](Self::output) and [`gradients`](Self::gradients) again: where the step was recorded they are
/// the same buffers each time, otherwise new ones. The gradients have the same bits as those of [`forward_backward`].
///
/// It stays on the thread that recorded it, since that is what orders writes, replays and reads: a client's stream is its
/// thread's. Clones of its handles must not be written or read from another thread while it replays, nor by a client that was moved
/// to another stream by hand: they might see old values, new ones, or a mix.
///
/// # Examples
/// ```no_run
/// use cubecl::bytes::Bytes;
/// use cubecl::client::Client;
/// use protohead::{Upstream, Wanted};
/// use protohead::cosine_cross_entropy::{Captured, Inputs, Options};
///
/// # fn train(client: &Client, inputs: &Inputs, batches: Vec<Vec<f32>>) -> Result<(), protohead::Error> {
/// let upstream = Upstream::Total(1.0);
/// let mut step = Captured::new(client, inputs, &Options::default(), &upstream, Wanted::BOTH)?;
/// for embeddings in batches {
///     client.write(&step.inputs().embeddings.handle, Bytes::from_elems(embeddings));
///     step.replay()?;
///     println!("loss {}", step.output().read_total(client)?);
/// }
/// # Ok(()) }
/// ```
pub struct Captured {
    client: Client,
    inputs: Inputs,
    options: Options,
    upstream: Upstream,
    wanted: Wanted,
    output: LossOutput,
    gradients: Gradients,
    recording: Option<Recording>,
    of_this_thread: PhantomData<*const ()>,
}

/// A graph, and the buffers that it reads and nobody else holds. What it writes between its launches, it guards itself.
struct Recording {
    graph: Graph,
    _read: (Option<Handle>, Option<Handle>),
}

impl fmt::Debug for Captured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Captured")
            .field("is_graph", &self.is_graph())
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

impl Captured {
    /// Runs the step twice, and records it. The outputs are unspecified until the first [`replay`](Self::replay).
    ///
    /// On CUDA no other thread may wait for the device meanwhile: the driver refuses that while a stream records, and gives up
    /// the recording.
    ///
    /// # Errors
    /// As [`forward_backward`]; [`Error::Device`] if the device records graphs, but not this one.
    pub fn new(
        client: &Client,
        inputs: &Inputs,
        options: &Options,
        upstream: &Upstream,
        wanted: Wanted,
    ) -> Result<Self, Error> {
        let call = Call::new(client, inputs, options)?;
        // Nothing is uploaded while a graph is recorded, so this is done before.
        let arriving = call.arriving(upstream)?;
        let step = || {
            let done = call.forward_backward(&arriving, wanted)?;
            block_on(client.sync()).map_err(Error::device)?;
            Ok(done)
        };
        // Nothing is allocated either: what a run leaves in the pools, the recorded one takes. But a pool that has to grow leaves
        // its small pages to what lies there already, so it grows before.
        drop(step()?);
        let record = || -> Result<_, Error> {
            client.graph_prepare().map_err(Error::device)?;
            let first = step();
            if first.is_err() {
                // Gives up what was prepared; there is no graph to have.
                let _ = client.stop_capture();
            }
            let done = first?;
            // What was prepared stands only where graphs are supported.
            if !client.is_capturing() {
                return Ok((done, None));
            }
            drop(done);
            client.start_capture().map_err(Error::device)?;
            let recorded = call.forward_backward(&arriving, wanted);
            let graph = client.stop_capture().map_err(Error::device)?;
            Ok((recorded?, Some(graph)))
        };
        // CUDA refuses other threads' allocations while a stream records, and the recording with them.
        let ((output, gradients), graph) = client.exclusive(record).map_err(Error::device)??;
        let recording = graph.map(|graph| Recording {
            graph,
            _read: (
                arriving.tensor.map(|(handle, _)| handle),
                call.head_weights.clone(),
            ),
        });
        Ok(Self {
            client: client.clone(),
            inputs: inputs.clone(),
            options: options.clone(),
            upstream: upstream.clone(),
            wanted,
            output,
            gradients,
            recording,
            of_this_thread: PhantomData,
        })
    }

    /// Whether the device recorded a graph.
    pub fn is_graph(&self) -> bool {
        self.recording.is_some()
    }

    /// The operands that a replay reads.
    pub fn inputs(&self) -> &Inputs {
        &self.inputs
    }

    /// What the last replay found.
    pub fn output(&self) -> &LossOutput {
        &self.output
    }

    /// The gradients of the last replay.
    pub fn gradients(&self) -> &Gradients {
        &self.gradients
    }

    /// The step, on what the inputs hold now.
    ///
    /// # Errors
    /// [`Error::Device`] if the device refuses it.
    pub fn replay(&mut self) -> Result<(), Error> {
        match &self.recording {
            Some(recording) => {
                // Other threads are told to keep away: they would find other values, but no memory that is not theirs.
                // SAFETY: all buffers are held here or guarded by the graph; this thread's stream orders what it does to them.
                unsafe { recording.graph.replay() }.map_err(Error::device)
            }
            None => {
                (self.output, self.gradients) = forward_backward(
                    &self.client,
                    &self.inputs,
                    &self.options,
                    &self.upstream,
                    self.wanted,
                )?;
                Ok(())
            }
        }
    }
}
