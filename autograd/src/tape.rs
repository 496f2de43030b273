//! Recording operators and walking them back.
//!
//! Reverse-mode differentiation: an operator that runs with a [`Tape`] leaves a node there that knows its inputs and
//! holds a closure from the gradients of its outputs to those of its inputs. [`Tape::backward`] runs the closures in
//! reverse order and drops each one as it goes, which frees what the forward pass had saved.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Deref;
use std::sync::Arc;

use crate::tensor::TensorId;
use crate::{Error, Result, Tensor, ops};

/// A value during a forward pass: a tensor, and where on the tape it came from (nowhere, for a constant).
#[derive(Clone, Debug)]
pub struct Var {
    tensor: Tensor,
    source: Option<Source>,
}

#[derive(Clone, Copy, Debug)]
struct Source {
    node: usize,
    output: usize,
}

impl Var {
    /// A value that no gradient flows to.
    pub fn constant(tensor: &Tensor) -> Self {
        Self { tensor: tensor.clone(), source: None }
    }

    /// The value.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// Whether a gradient can flow to this value.
    pub fn needs_gradient(&self) -> bool {
        self.source.is_some()
    }

    /// The same value under another shape; gradients pass through.
    ///
    /// # Errors
    /// [`Error::Shape`] when the element counts differ.
    pub fn reshape(&self, tape: &Tape<'_>, shape: &[usize]) -> Result<Self> {
        let original = self.shape().to_vec();
        let reshaped = self.tensor.reshape(shape)?;
        Ok(tape.record_one(&[self], reshaped, move |gradient, _| Ok(vec![Some(gradient.reshape(&original)?)])))
    }
}

impl Deref for Var {
    type Target = Tensor;

    fn deref(&self) -> &Tensor {
        &self.tensor
    }
}

/// From the gradients of an operator's outputs, and which inputs need one, to the gradients of its inputs.
type Backward<'a> = Box<dyn FnOnce(&[Option<Tensor>], &[bool], &mut Gradients) -> Result<Vec<Option<Tensor>>> + 'a>;

struct Node<'a> {
    inputs: Vec<Option<Source>>,
    outputs: usize,
    kind: NodeKind<'a>,
    /// The range in which the operator ran: its backward runs in one of the same name, for the profiler.
    range: Option<Arc<str>>,
}

enum NodeKind<'a> {
    Leaf(Tensor),
    Operator(Backward<'a>),
}

/// What operators leave behind for the reverse pass. `'a` is the lifetime of what their closures borrow.
#[derive(Default)]
pub struct Tape<'a> {
    recording: bool,
    nodes: RefCell<Vec<Node<'a>>>,
    leaves: RefCell<HashMap<TensorId, Source>>,
}

impl<'a> Tape<'a> {
    /// A tape that records.
    pub fn new() -> Self {
        Self { recording: true, ..Self::default() }
    }

    /// A tape that records nothing: operators only compute.
    pub fn inference() -> Self {
        Self::default()
    }

    /// Whether operators leave nodes here.
    pub fn is_recording(&self) -> bool {
        self.recording
    }

    /// A value whose gradient is wanted. Asking twice for one tensor gives the same leaf, so a weight that is used in
    /// two places has one gradient, the sum.
    pub fn leaf(&self, tensor: &Tensor) -> Var {
        if !self.recording {
            return Var::constant(tensor);
        }
        let source = *self.leaves.borrow_mut().entry(tensor.id()).or_insert_with(|| {
            let mut nodes = self.nodes.borrow_mut();
            nodes.push(Node { inputs: Vec::new(), outputs: 1, kind: NodeKind::Leaf(tensor.clone()), range: None });
            Source { node: nodes.len() - 1, output: 0 }
        });
        Var { tensor: tensor.clone(), source: Some(source) }
    }

    /// Records an operator with several outputs. `backward` gets the gradient of each output (`None`: nothing depends
    /// on it) and, per input, whether its gradient is needed; it returns one entry per input. Nothing is recorded when
    /// no input needs a gradient.
    pub fn record(
        &self,
        inputs: &[&Var],
        outputs: Vec<Tensor>,
        backward: impl FnOnce(&[Option<Tensor>], &[bool]) -> Result<Vec<Option<Tensor>>> + 'a,
    ) -> Vec<Var> {
        if !self.recording || inputs.iter().all(|input| !input.needs_gradient()) {
            return outputs.iter().map(Var::constant).collect();
        }
        self.push(inputs, outputs, Box::new(move |gradients, needed, _| backward(gradients, needed)))
    }

    /// Records an operator with one output; see [`Tape::record`].
    pub fn record_one(
        &self,
        inputs: &[&Var],
        output: Tensor,
        backward: impl FnOnce(&Tensor, &[bool]) -> Result<Vec<Option<Tensor>>> + 'a,
    ) -> Var {
        let mut outputs = self.record(inputs, vec![output], |gradients, needed| match &gradients[0] {
            Some(gradient) => backward(gradient, needed),
            None => Ok(vec![None; needed.len()]),
        });
        outputs.swap_remove(0)
    }

    /// Runs `function` without keeping what it saves, and runs it again during the reverse pass: memory for time.
    /// Leaves that `function` takes from its tape get their gradients as usual.
    ///
    /// # Errors
    /// Those of `function`.
    pub fn checkpoint(
        &self,
        inputs: &[&Var],
        function: impl Fn(&Tape<'a>, &[Var]) -> Result<Vec<Var>> + 'a,
    ) -> Result<Vec<Var>> {
        let constants: Vec<Var> = inputs.iter().map(|input| Var::constant(input)).collect();
        let outputs = function(&Tape::inference(), &constants)?;
        let outputs: Vec<Tensor> = outputs.into_iter().map(|output| output.tensor).collect();
        if !self.recording {
            return Ok(outputs.iter().map(Var::constant).collect());
        }
        let saved: Vec<Tensor> = inputs.iter().map(|input| input.tensor.clone()).collect();
        Ok(self.push(
            inputs,
            outputs,
            Box::new(move |gradients, needed, leaf_gradients| {
                let tape = Tape::new();
                // Views, so that an input that is also a parameter keeps the two gradients apart.
                let views: Vec<Tensor> =
                    saved.iter().map(|input| input.reshape(input.shape())).collect::<Result<_>>()?;
                let variables: Vec<Var> = views
                    .iter()
                    .zip(needed)
                    .map(|(view, &needed)| if needed { tape.leaf(view) } else { Var::constant(view) })
                    .collect();
                let outputs = function(&tape, &variables)?;
                let seeds = outputs
                    .into_iter()
                    .zip(gradients)
                    .filter_map(|(output, gradient)| Some((output, gradient.clone()?)));
                let mut inner = tape.backward_from(seeds.collect())?;
                let input_gradients = views.iter().map(|view| inner.take(view)).collect();
                leaf_gradients.merge(inner)?;
                Ok(input_gradients)
            }),
        ))
    }

    /// Gradients of a scalar with respect to every leaf it depends on. Consumes the tape.
    ///
    /// # Errors
    /// [`Error::Shape`] when `loss` is no scalar; those of the operators.
    pub fn backward(self, loss: &Var) -> Result<Gradients> {
        if loss.count() != 1 {
            return Err(Error::Shape {
                operator: "backward",
                argument: "loss",
                expected: "one element".to_owned(),
                found: loss.shape().to_vec(),
            });
        }
        let one = Tensor::filled(loss.device(), loss.shape(), loss.dtype(), 1.0)?;
        self.backward_from(vec![(loss.clone(), one)])
    }

    /// Gradients of `Σ value · seed` over the given pairs with respect to every leaf. Consumes the tape.
    ///
    /// # Errors
    /// [`Error::Shape`] when a seed does not have its value's shape; those of the operators.
    pub fn backward_from(self, seeds: Vec<(Var, Tensor)>) -> Result<Gradients> {
        let nodes = self.nodes.into_inner();
        let mut pending: Vec<Vec<Option<Tensor>>> = nodes.iter().map(|node| vec![None; node.outputs]).collect();
        for (value, seed) in seeds {
            crate::check::shape("backward", "seed", &seed, value.shape())?;
            if let Some(source) = value.source {
                accumulate(&mut pending[source.node][source.output], seed)?;
            }
        }
        let mut gradients = Gradients::default();
        for (index, node) in nodes.into_iter().enumerate().rev() {
            let outputs = std::mem::take(&mut pending[index]);
            if outputs.iter().all(Option::is_none) {
                continue;
            }
            match node.kind {
                NodeKind::Leaf(tensor) => {
                    for gradient in outputs.into_iter().flatten() {
                        gradients.add(&tensor, gradient)?;
                    }
                }
                NodeKind::Operator(backward) => {
                    let _range = node.range.as_deref().map(runtime::range);
                    let needed: Vec<bool> = node.inputs.iter().map(Option::is_some).collect();
                    let input_gradients = backward(&outputs, &needed, &mut gradients)?;
                    drop(outputs);
                    debug_assert_eq!(input_gradients.len(), node.inputs.len());
                    for (source, gradient) in node.inputs.into_iter().zip(input_gradients) {
                        if let (Some(source), Some(gradient)) = (source, gradient) {
                            accumulate(&mut pending[source.node][source.output], gradient)?;
                        }
                    }
                }
            }
        }
        Ok(gradients)
    }

    fn push(&self, inputs: &[&Var], outputs: Vec<Tensor>, backward: Backward<'a>) -> Vec<Var> {
        let mut nodes = self.nodes.borrow_mut();
        let node = nodes.len();
        nodes.push(Node {
            inputs: inputs.iter().map(|input| input.source).collect(),
            outputs: outputs.len(),
            kind: NodeKind::Operator(backward),
            range: runtime::open_range(),
        });
        outputs
            .into_iter()
            .enumerate()
            .map(|(output, tensor)| Var { tensor, source: Some(Source { node, output }) })
            .collect()
    }
}

/// Gradients of leaves, by tensor. A clone shares them.
#[derive(Clone, Default)]
pub struct Gradients {
    // Identities, not tensors: holding a leaf here would make an optimizer's update copy it.
    by_tensor: HashMap<TensorId, Tensor>,
}

impl Gradients {
    /// The gradient of a leaf; `None` when the result does not depend on it.
    pub fn get(&self, leaf: &Tensor) -> Option<&Tensor> {
        self.by_tensor.get(&leaf.id())
    }

    /// Takes the gradient of a leaf out.
    pub fn take(&mut self, leaf: &Tensor) -> Option<Tensor> {
        self.by_tensor.remove(&leaf.id())
    }

    /// Adds `gradient` to what is there for `leaf`.
    ///
    /// # Errors
    /// [`Error::Shape`] when the shapes differ.
    pub fn add(&mut self, leaf: &Tensor, gradient: Tensor) -> Result<()> {
        self.add_by_id(leaf.id(), gradient)
    }

    /// Multiplies every gradient by `factor`.
    ///
    /// # Errors
    /// Out of memory.
    pub fn scale(&mut self, factor: f32) -> Result<()> {
        for gradient in self.by_tensor.values_mut() {
            ops::scale_in_place(gradient, factor)?;
        }
        Ok(())
    }

    /// Adds every gradient of `other` to this set's.
    ///
    /// # Errors
    /// As [`Gradients::add`].
    pub fn merge(&mut self, other: Self) -> Result<()> {
        for (leaf, gradient) in other.by_tensor {
            self.add_by_id(leaf, gradient)?;
        }
        Ok(())
    }

    fn add_by_id(&mut self, leaf: TensorId, gradient: Tensor) -> Result<()> {
        match self.by_tensor.get_mut(&leaf) {
            Some(sum) => ops::add_in_place(sum, &gradient),
            None => {
                self.by_tensor.insert(leaf, gradient);
                Ok(())
            }
        }
    }
}

fn accumulate(sum: &mut Option<Tensor>, gradient: Tensor) -> Result<()> {
    match sum {
        Some(sum) => ops::add_in_place(sum, &gradient),
        None => {
            *sum = Some(gradient);
            Ok(())
        }
    }
}
