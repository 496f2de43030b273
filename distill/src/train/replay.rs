//! Updates that are replayed: the launches of one update, captured as a graph, and run with one call for each later batch.
//!
//! A graph reads and writes the memory that it was captured with. So the batch lies in tensors that are overwritten, and
//! gradients and losses are in the same place each time: whoever wants to keep them copies them before the next run.
//! Parameters are updated in place; should one have moved all the same, the graph does not fit any more.

use anyhow::Result;
use autograd::{Gradients, Tape, TensorId};
use model::Model;
use runtime::cuda::Graph;

use super::objective::{Objective, Unread};
use crate::data::{Batch, Sequence};

/// A captured update, up to its gradients.
pub(super) struct Replay {
    graph: Graph,
    objective: Objective,
    /// What the launches read.
    batch: Batch,
    /// The tensors of the student's parameters.
    parameters: Vec<TensorId>,
    gradients: Gradients,
    loss: Unread,
}

impl Replay {
    /// Captures the launches for a batch of which `places` positions are divided by; runs nothing.
    ///
    /// # Errors
    /// Those of the models; out of memory; driver errors.
    pub fn capture(
        objective: Objective,
        student: &Model,
        teacher: Option<&Model>,
        batch: Batch,
        places: u64,
    ) -> Result<Self> {
        let (graph, (gradients, loss)) = student.device().capture(|| -> Result<_> {
            let tape = Tape::new();
            let (value, loss) = objective.compute(&tape, student, teacher, &batch, places, false)?;
            Ok((tape.backward(&value)?, loss))
        })?;
        Ok(Self { graph, objective, batch, parameters: ids(student), gradients, loss })
    }

    /// Whether it computes this loss of this model, from so many rows.
    pub fn is_of(&self, objective: &Objective, student: &Model, rows: usize) -> bool {
        self.objective == *objective && self.batch.tokens.batch() == rows && self.parameters == ids(student)
    }

    /// The gradients and the loss of other rows. Both hold until the next run.
    ///
    /// # Errors
    /// Rows of another length; driver errors.
    pub fn run(&mut self, sequences: &[Sequence]) -> Result<(Gradients, Unread)> {
        self.batch.overwrite(sequences, self.objective.positions)?;
        self.graph.replay()?;
        Ok((self.gradients.clone(), self.loss.clone()))
    }
}

fn ids(model: &Model) -> Vec<TensorId> {
    model.parameters.iter().map(|(_, parameter)| parameter.value.id()).collect()
}
