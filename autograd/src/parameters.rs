//! Named weights in one flat table.

use crate::{Error, Result, Tape, Tensor, Var};

/// Position of a parameter in its [`Parameters`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ParameterId(usize);

/// One weight of a model.
#[derive(Clone, Debug)]
pub struct Parameter {
    /// Its name, as in the checkpoint.
    pub name: String,
    /// Its value.
    pub value: Tensor,
    /// Whether gradients are computed and updates applied.
    pub trainable: bool,
    /// Whether weight decay applies.
    pub decay: bool,
    /// Multiple of the learning rate at which it is trained; 1 for most.
    pub rate: f32,
}

/// A model's weights in a fixed order. Clones share the values.
#[derive(Clone, Debug, Default)]
pub struct Parameters {
    entries: Vec<Parameter>,
}

impl Parameters {
    /// Adds a parameter and returns where it is.
    pub fn push(&mut self, parameter: Parameter) -> ParameterId {
        self.entries.push(parameter);
        ParameterId(self.entries.len() - 1)
    }

    /// Number of parameters (tensors).
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The parameter at `id`.
    pub fn get(&self, id: ParameterId) -> &Parameter {
        &self.entries[id.0]
    }

    /// The parameter at `id`, for changing.
    pub fn get_mut(&mut self, id: ParameterId) -> &mut Parameter {
        &mut self.entries[id.0]
    }

    /// The parameter called `name`.
    pub fn find(&self, name: &str) -> Option<ParameterId> {
        self.entries.iter().position(|parameter| parameter.name == name).map(ParameterId)
    }

    /// All parameters in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (ParameterId, &Parameter)> {
        self.entries.iter().enumerate().map(|(index, parameter)| (ParameterId(index), parameter))
    }

    /// All parameters in order, for changing.
    pub fn iter_mut(&mut self) -> impl ExactSizeIterator<Item = (ParameterId, &mut Parameter)> {
        self.entries.iter_mut().enumerate().map(|(index, parameter)| (ParameterId(index), parameter))
    }

    /// The parameter as a value of a forward pass: a leaf when it is trainable, a constant otherwise.
    pub fn var(&self, tape: &Tape<'_>, id: ParameterId) -> Var {
        let parameter = self.get(id);
        if parameter.trainable { tape.leaf(&parameter.value) } else { Var::constant(&parameter.value) }
    }

    /// Replaces the value of a parameter by one of the same shape.
    ///
    /// # Errors
    /// [`Error::Shape`] when the shapes differ.
    pub fn set(&mut self, id: ParameterId, value: Tensor) -> Result<()> {
        let parameter = self.get_mut(id);
        if parameter.value.shape() != value.shape() {
            return Err(Error::Invalid {
                operator: "setting a parameter",
                message: format!(
                    "{} has shape {:?}, the new value has {:?}",
                    parameter.name,
                    parameter.value.shape(),
                    value.shape()
                ),
            });
        }
        parameter.value = value;
        Ok(())
    }
}
