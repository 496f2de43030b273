//! Filling a table of parameters from weight files.

use std::collections::HashSet;

use autograd::{DType, Element, Parameter, Parameters, Tensor};
use half::bf16;
use runtime::Device;

use super::convert::{self, StoredType, first_not_finite};
use super::files::{View, WeightFiles};
use super::{ParameterSpec, names};
use crate::config::ModelConfig;
use crate::{Error, Result};

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// Reads the parameters `specs`, in their order.
///
/// Every destination starts as NaN and must be written exactly once, with finite numbers. Tensors that no spec wants
/// are refused, except buffers that follow from the configuration. Where the embedding is also the head, a stored
/// `lm_head.weight` is accepted if it is the embedding bit for bit, and refused otherwise: one of the two would be lost.
/// `goes_on` is asked before each tensor.
///
/// # Errors
/// [`Error::Stopped`] when `goes_on` says no;
/// [`Error::MissingTensor`], [`Error::TensorShape`], [`Error::Tensor`] for values that are not finite or a type that is
/// not a float, [`Error::UnexpectedTensors`]; out of memory.
pub fn load(
    files: &WeightFiles,
    config: &ModelConfig,
    specs: &[ParameterSpec],
    device: &Device,
    mut goes_on: impl FnMut() -> bool,
) -> Result<Parameters> {
    let views = check(files, config, specs)?;
    let mut parameters = Parameters::default();
    for (spec, view) in specs.iter().zip(&views) {
        if !goes_on() {
            return Err(Error::Stopped);
        }
        let value = match spec.dtype {
            DType::Bf16 => read::<bf16>(view, spec, device, convert::to_bf16)?,
            _ => read::<f32>(view, spec, device, convert::to_f32)?,
        };
        parameters.push(Parameter {
            name: spec.name.clone(),
            value,
            trainable: spec.trainable,
            decay: spec.decay,
            rate: 1.0,
        });
    }
    Ok(parameters)
}

/// Finds every parameter in the files without reading its values: names, shapes, nothing missing and nothing left over.
pub(crate) fn check<'a>(
    files: &'a WeightFiles,
    config: &ModelConfig,
    specs: &[ParameterSpec],
) -> Result<Vec<View<'a>>> {
    let geometry = config.mamba.as_ref();
    let mut wanted: HashSet<&str> = HashSet::with_capacity(specs.len());
    for spec in specs {
        if !wanted.insert(&spec.name) {
            return Err(Error::Format {
                path: files.folder().to_owned(),
                problem: format!("the parameter {} would be written twice: the model asks for it twice", spec.name),
            });
        }
    }
    let tied_head = config.tied_embeddings && files.info(HEAD).is_some();
    let others = files.others(&|name| wanted.contains(name) || (tied_head && name == HEAD));
    let mut views = Vec::with_capacity(specs.len());
    for spec in specs {
        let view = files.view(&spec.name, geometry).ok_or_else(|| files.missing(&spec.name))?;
        if view.shape != spec.shape {
            return Err(Error::TensorShape {
                path: view.path().to_owned(),
                tensor: view.name.to_owned(),
                expected: spec.shape.clone(),
                found: view.shape,
            });
        }
        views.push(view);
    }
    if !others.is_empty() {
        return Err(Error::UnexpectedTensors { folder: files.folder().to_owned(), names: others });
    }
    if tied_head {
        check_tied_head(files)?;
    }
    Ok(views)
}

fn read<T: Element>(
    view: &View<'_>,
    spec: &ParameterSpec,
    device: &Device,
    convert: impl Fn(StoredType, &[u8], &mut [T]),
) -> Result<Tensor> {
    let mut destination = Destination::<T>::new(spec, device)?;
    let (kind, bytes) = (view.float_type()?, view.bytes()?);
    destination.write(view, |output| convert(kind, bytes, output))?;
    destination.finish(view, device)
}

/// A parameter on its way into memory.
struct Destination<T> {
    /// On the CPU, NaN until written.
    values: Tensor,
    written: usize,
    element: std::marker::PhantomData<T>,
}

impl<T: Element> Destination<T> {
    fn new(spec: &ParameterSpec, device: &Device) -> Result<Self> {
        let host = if device.is_cpu() { device.clone() } else { Device::cpu() };
        let values = Tensor::filled(&host, &spec.shape, T::DTYPE, f32::NAN)?;
        Ok(Self { values, written: 0, element: std::marker::PhantomData })
    }

    /// Writes the elements that `view` holds after those written before.
    fn write(&mut self, view: &View<'_>, fill: impl FnOnce(&mut [T])) -> Result<()> {
        let count: usize = view.shape.iter().product();
        let begin = self.written;
        let fail = |problem: &str| Error::tensor(view.path(), view.name, problem);
        let output = self.values.make_mut::<T>()?;
        let output = output.get_mut(begin..begin + count).ok_or_else(|| fail("written twice"))?;
        fill(output);
        self.written += count;
        Ok(())
    }

    /// The parameter on its device, when every element was written with a finite number.
    fn finish(self, view: &View<'_>, device: &Device) -> Result<Tensor> {
        let values = self.values.host_slice::<T>()?;
        if self.written != values.len() {
            let problem = format!("{} of {} elements were never written", values.len() - self.written, values.len());
            return Err(Error::tensor(view.path(), view.name, problem));
        }
        let kind = if T::DTYPE == DType::Bf16 { StoredType::Bf16 } else { StoredType::F32 };
        if let Some(position) = first_not_finite(bytemuck::cast_slice(values), kind) {
            return Err(not_finite(view.path(), view.name, &view.shape, position));
        }
        if device.is_cpu() {
            return Ok(self.values);
        }
        Ok(Tensor::from_slice(device, self.values.shape(), values)?)
    }
}

/// The error for a weight that is NaN or infinite.
pub(crate) fn not_finite(path: &std::path::Path, tensor: &str, shape: &[usize], position: usize) -> Error {
    let mut index = Vec::with_capacity(shape.len());
    let mut rest = position;
    for size in shape.iter().rev() {
        index.push(rest % size);
        rest /= size;
    }
    index.reverse();
    Error::tensor(path, tensor, format!("the element at {index:?} is NaN or infinite: the weights are damaged"))
}

fn check_tied_head(files: &WeightFiles) -> Result<()> {
    let embedding = files.view(EMBEDDING, None).ok_or_else(|| files.missing(EMBEDDING))?;
    let Some(head) = files.view(HEAD, None) else { return Ok(()) };
    if head.dtype == embedding.dtype && head.shape == embedding.shape && head.bytes()? == embedding.bytes()? {
        return Ok(());
    }
    Err(Error::tensor(
        head.path(),
        head.name,
        format!(
            "differs from {}, but tie_word_embeddings is true in config.json: set it to false to use this head, or \
             remove the tensor",
            names::canonical(embedding.name)
        ),
    ))
}
