//! The GPU way: kernels of [`kernels_ptx::kernels::causal_conv1d`].

use kernels_ptx::kernels::causal_conv1d::{self as kernels, ConvolutionBackward, ConvolutionForward, ConvolutionStep};
use runtime::Argument;

use super::{Activation, Convolution, ConvolutionGradients, OPERATOR};
use crate::gpu::{self, Output};
use crate::{DType, Result, Tensor};

/// What both directions need: the kernels' choices, the operands in the types that kernels take, the sizes.
struct Launch {
    form: kernels::Convolution,
    weight: Tensor,
    bias: Option<Tensor>,
    initial_state: Option<Tensor>,
    sizes: [u32; 3],
}

impl Launch {
    fn new(convolution: &Convolution) -> Result<Self> {
        let Convolution { input, weight, bias, activation, document_start, initial_state } = convolution;
        let mut sizes = [0; 3];
        for (size, (what, extent)) in sizes.iter_mut().zip(["batch", "time", "channels"].iter().zip(input.shape())) {
            *size = gpu::size(OPERATOR, what, *extent)?;
        }
        let form = kernels::Convolution {
            element: gpu::element(input.dtype()),
            width: gpu::size(OPERATOR, "the width", weight.shape()[1])?,
            bias: bias.is_some(),
            silu: *activation == Activation::Silu,
            documents: document_start.is_some(),
            initial: initial_state.is_some(),
            vector: sizes[2].is_multiple_of(kernels::VECTOR),
        };
        let bias = bias.as_ref().map(|bias| bias.cast(DType::F32)).transpose()?;
        let initial_state = initial_state.as_ref().map(|state| state.cast(input.dtype())).transpose()?;
        Ok(Self { form, weight: weight.cast(DType::F32)?, bias, initial_state, sizes })
    }

    /// The inputs and sizes, as both kernels take them.
    fn inputs<'a>(&'a self, convolution: &'a Convolution) -> Vec<Argument<'a>> {
        let [_, time, channels] = self.sizes;
        let mut arguments = vec![gpu::read(&convolution.input), gpu::read(&self.weight)];
        arguments.extend(self.bias.as_ref().map(gpu::read));
        arguments.extend(convolution.document_start.as_ref().map(gpu::read));
        arguments.extend(self.initial_state.as_ref().map(gpu::read));
        arguments.extend([Argument::U32(time), Argument::U32(channels)]);
        arguments
    }
}

pub(super) fn forward(convolution: &Convolution) -> Result<Tensor> {
    let launch = Launch::new(convolution)?;
    let mut output = Output::like(&convolution.input)?;
    let mut arguments = vec![output.write()];
    arguments.extend(launch.inputs(convolution));
    let kernel = ConvolutionForward(launch.form);
    let [batch, time, channels] = launch.sizes;
    let (grid, sizes) = (launch.form.forward_grid(batch, time, channels), launch.sizes.map(u64::from));
    gpu::launch(OPERATOR, convolution.input.device(), &kernel, grid, &sizes, &arguments)?;
    drop(arguments);
    Ok(output.tensor())
}

pub(super) fn backward(convolution: &Convolution, gradient: &Tensor) -> Result<ConvolutionGradients> {
    let input = &convolution.input;
    let device = input.device();
    let launch = Launch::new(convolution)?;
    let gradient = gradient.cast(input.dtype())?;
    let (channels, width) = (input.shape()[2], convolution.weight.shape()[1]);
    let [batch, time, _] = launch.sizes;
    let stretches = launch.form.stretches(batch, time, launch.sizes[2]);
    let mut input_gradient = Output::like(input)?;
    let mut weight_gradient = Output::new(device, &[channels, width], DType::F32)?;
    let mut bias_gradient =
        convolution.bias.as_ref().map(|_| Output::new(device, &[channels], DType::F32)).transpose()?;
    let mut state_gradient = launch.initial_state.as_ref().map(Output::like).transpose()?;
    if input.count() == 0 {
        // Nothing is launched that would write them.
        let outputs = [Some(&mut weight_gradient), bias_gradient.as_mut(), state_gradient.as_mut()];
        outputs.into_iter().flatten().try_for_each(Output::set_zero)?;
    }
    let cuts = stretches.map_or([0; 3], |cut| [cut.long_blocks, cut.long_steps, cut.short_steps]);
    let mut sums = device.zeroed(stretches.map_or(0, |stretches| stretches.sums) * DType::U32.size())?;
    let mut arguments = vec![input_gradient.write(), weight_gradient.write()];
    arguments.extend(bias_gradient.as_mut().map(Output::write));
    arguments.extend(state_gradient.as_mut().map(Output::write));
    arguments.push(Argument::Write(sums.buffer(), kernels_ptx::Element::U32));
    arguments.push(gpu::read(&gradient));
    arguments.extend(launch.inputs(convolution));
    arguments.extend(cuts.map(Argument::U32));
    let (kernel, grid) = (ConvolutionBackward(launch.form), stretches.map(|stretches| stretches.grid));
    gpu::launch(OPERATOR, device, &kernel, grid, &launch.sizes.map(u64::from), &arguments)?;
    drop(arguments);
    sums.keep()?;
    let state = state_gradient.map(Output::tensor).zip(convolution.initial_state.as_ref());
    Ok(ConvolutionGradients {
        input: input_gradient.tensor(),
        weight: weight_gradient.tensor(),
        bias: bias_gradient.map(Output::tensor),
        initial_state: state.map(|(gradient, like)| gradient.cast(like.dtype())).transpose()?,
    })
}

pub(super) fn step(
    state: &mut Tensor,
    input: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    activation: Activation,
) -> Result<Tensor> {
    const OPERATOR: &str = "causal_conv1d_step";
    let (channels, width, length) = (input.shape()[1], weight.shape()[1], state.shape()[2]);
    let count = gpu::size(OPERATOR, "the number of channels of all rows", input.count())?;
    let channel_count = gpu::size(OPERATOR, "the number of channels", channels)?;
    let columns = gpu::size(OPERATOR, "the state length", length)?;
    let kernel = ConvolutionStep {
        element: gpu::element(input.dtype()),
        width: gpu::size(OPERATOR, "the width", width)?,
        bias: bias.is_some(),
        silu: activation == Activation::Silu,
    };
    let weight = weight.cast(DType::F32)?;
    let bias = bias.map(|bias| bias.cast(DType::F32)).transpose()?;
    let mut output = Output::like(input)?;
    let mut arguments = vec![
        output.write(),
        Argument::Write(state.make_unique()?, kernels_ptx::Element::F32),
        gpu::read(input),
        gpu::read(&weight),
    ];
    arguments.extend(bias.as_ref().map(gpu::read));
    arguments.extend([count, channel_count, columns].map(Argument::U32));
    let sizes = [input.shape()[0], channels, length].map(|size| size as u64);
    gpu::launch(OPERATOR, input.device(), &kernel, ConvolutionStep::grid(count.into()), &sizes, &arguments)?;
    drop(arguments);
    Ok(output.tensor())
}
