//! The GPU way: kernels of [`kernels_ptx::kernels::selective_scan`].

use kernels_ptx::kernels::selective_scan::{
    self as kernels, CHUNK, CombineSpans, GroupGradient, GroupSums, MOST_CHUNK_STATES, MOST_STATES, ScanBackward,
    ScanForward, ScanStep, SerialBackward, SerialForward, Shares, Sizes, SpanCarries, SpanStates, TILE,
};
use runtime::{Argument, Device};

use super::{OPERATOR, Scan, ScanStepInputs, ScanWay};
use crate::gpu::{self, Output};
use crate::{DType, Error, Result, Tensor};

/// Multiprocessors that rows are cut into spans for, or scanned whole: an H100's. The same on every device, since that decides
/// in which order sums are formed.
const MULTIPROCESSORS: u32 = 132;

/// What all launches need: the kernels' choices, the operands in the types that kernels take, how time is cut.
struct Launch<'a> {
    scan: &'a Scan,
    form: kernels::Scan,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Option<Tensor>,
    gate: Option<Tensor>,
    delta_bias: Option<Tensor>,
    initial_state: Option<Tensor>,
    sizes: Sizes,
    chunk: u32,
    span: u32,
}

impl<'a> Launch<'a> {
    fn new(scan: &'a Scan) -> Result<Self> {
        let dtype = scan.input.dtype();
        let optional = |tensor: &Option<Tensor>, dtype| tensor.as_ref().map(|tensor| tensor.cast(dtype)).transpose();
        let size = |what, size| gpu::size(OPERATOR, what, size);
        let states = states(OPERATOR, scan.states)?;
        let sizes = Sizes {
            batch: size("batch", scan.batch)?,
            time: size("time", scan.time)?,
            channels: size("the number of channels", scan.channels)?,
            b_groups: size("the number of groups of b", scan.b.shape()[2])?,
            c_groups: size("the number of groups of c", scan.c.shape()[2])?,
        };
        let (chunk, span) = match scan.way {
            None | Some(ScanWay::Serial | ScanWay::Shared(_) | ScanWay::Spans) => {
                (CHUNK, sizes.span(CHUNK, MULTIPROCESSORS))
            }
            Some(ScanWay::Chunks(chunk)) => {
                let chunk = size("the chunk", chunk.get())?;
                if u64::from(chunk) * u64::from(states) > u64::from(MOST_CHUNK_STATES) {
                    let message = format!(
                        "chunks of {chunk} steps of {states} states: GPUs have room for {MOST_CHUNK_STATES} states of a \
                         channel and chunk"
                    );
                    return Err(Error::Invalid { operator: OPERATOR, message });
                }
                (chunk, chunk)
            }
        };
        Ok(Self {
            scan,
            form: kernels::Scan {
                element: gpu::element(dtype),
                states,
                skip: scan.d.is_some(),
                gate: scan.gate.is_some(),
                bias: scan.delta_bias.is_some(),
                softplus: scan.delta_softplus,
                documents: scan.document_start.is_some(),
            },
            delta: scan.delta.cast(dtype)?,
            a: scan.a.cast(DType::F32)?,
            b: scan.b.cast(dtype)?,
            c: scan.c.cast(dtype)?,
            d: optional(&scan.d, DType::F32)?,
            gate: optional(&scan.gate, dtype)?,
            delta_bias: optional(&scan.delta_bias, DType::F32)?,
            initial_state: optional(&scan.initial_state, DType::F32)?,
            sizes,
            chunk,
            span,
        })
    }

    fn device(&self) -> &Device {
        self.scan.input.device()
    }

    /// The blocks that scan whole rows; `None` where spans are scanned.
    fn serial_grid(&self) -> Result<Option<[u32; 3]>> {
        let grid = SerialForward::grid(&self.sizes, self.form.states);
        match (self.scan.way, grid) {
            (Some(ScanWay::Spans | ScanWay::Chunks(_)), _) => Ok(None),
            // Fewer blocks take as long as these, while spans take less time the fewer there are.
            (None, grid) => Ok(grid.filter(|[blocks, ..]| *blocks >= MULTIPROCESSORS)),
            (Some(ScanWay::Serial | ScanWay::Shared(_)), Some(grid)) => Ok(Some(grid)),
            (Some(ScanWay::Serial | ScanWay::Shared(_)), None) => Err(Error::Invalid {
                operator: OPERATOR,
                message: format!(
                    "{} states, groups of {} and {} channels: whole rows are scanned in channels of 16 states whose groups \
                     are multiples of 16 channels",
                    self.form.states,
                    self.sizes.b_width(),
                    self.sizes.c_width()
                ),
            }),
        }
    }

    /// How blocks share the tiles of whole rows in the forward pass; `None` where each takes one.
    fn shares(&self) -> Result<Option<Shares>> {
        match self.scan.way {
            None => Ok(Shares::of(&self.sizes)),
            Some(ScanWay::Shared(blocks)) => {
                let blocks = gpu::size(OPERATOR, "the number of blocks", blocks.get())?;
                Ok(Shares::among(&self.sizes, blocks))
            }
            Some(ScanWay::Serial | ScanWay::Spans | ScanWay::Chunks(_)) => Ok(None),
        }
    }

    /// Where blocks leave states for each other, and the flags that tell of them.
    fn handed(&self, shares: Shares) -> Result<[Output; 2]> {
        let blocks = shares.blocks as usize;
        let states = Output::new(self.device(), &[blocks, TILE as usize, self.scan.states], DType::F32)?;
        let mut flags = Output::new(self.device(), &[blocks], DType::U32)?;
        flags.set_zero()?;
        Ok([states, flags])
    }

    fn spans(&self) -> u32 {
        self.sizes.time.div_ceil(self.span)
    }

    fn chunks(&self) -> u32 {
        self.sizes.time.div_ceil(self.chunk)
    }

    /// The problem's sizes, as the kernels' descriptions name them.
    fn problem(&self) -> [u64; 6] {
        let Sizes { batch, time, channels, b_groups, c_groups } = self.sizes;
        [batch, time, channels, self.form.states, b_groups, c_groups].map(u64::from)
    }

    /// The sizes that end the parameters of all kernels that scan.
    fn arguments(&self) -> [Argument<'static>; 7] {
        let Sizes { batch, time, channels, .. } = self.sizes;
        let (run, b_width, c_width) = (self.sizes.run(), self.sizes.b_width(), self.sizes.c_width());
        [batch * self.sizes.tiles(), time, channels, run, b_width, c_width, self.span].map(Argument::U32)
    }

    /// The sizes that end the parameters of the kernels that scan whole rows.
    fn serial_arguments(&self) -> [Argument<'static>; 4] {
        let Sizes { time, channels, .. } = self.sizes;
        [time, channels, self.sizes.b_width(), self.sizes.c_width()].map(Argument::U32)
    }

    /// f32 `[batch, outer, channels, states]`.
    fn states(&self, outer: u32) -> Result<Output> {
        let scan = self.scan;
        Output::new(self.device(), &[scan.batch, outer as usize, scan.channels, scan.states], DType::F32)
    }

    /// f32 `[batch, outer, channels]`.
    fn channels(&self, outer: u32) -> Result<Output> {
        Output::new(self.device(), &[self.scan.batch, outer as usize, self.scan.channels], DType::F32)
    }

    /// Replaces what spans leave behind by what reaches them.
    fn combine(&self, states: &mut Output, sums: &Tensor, initial: Option<&Tensor>, reverse: bool) -> Result<()> {
        let Sizes { batch, time, channels, .. } = self.sizes;
        let kernel = CombineSpans {
            states: self.form.states,
            reverse,
            initial: initial.is_some(),
            documents: self.form.documents,
        };
        let mut arguments = vec![states.write(), gpu::read(sums), gpu::read(&self.a)];
        arguments.extend(initial.map(gpu::read));
        arguments.extend(self.scan.document_start.as_ref().map(gpu::read));
        arguments.extend([batch * channels, channels, self.spans(), time, self.span].map(Argument::U32));
        let count = u64::from(batch) * u64::from(channels) * u64::from(self.form.states);
        let sizes = [batch, channels, self.form.states, self.spans()].map(u64::from);
        gpu::launch(OPERATOR, self.device(), &kernel, CombineSpans::grid(count), &sizes, &arguments)
    }

    /// The states at the starts of the spans: `None` when there is one span, and it starts from zero.
    fn start_states(&self) -> Result<Option<Tensor>> {
        let spans = self.spans();
        if spans <= 1 {
            return Ok(self.initial_state.clone());
        }
        let (mut states, mut sums) = (self.states(spans)?, self.channels(spans)?);
        let kernel = SpanStates(kernels::Scan { skip: false, gate: false, ..self.form });
        let mut arguments = vec![states.write(), sums.write()];
        arguments.extend([&self.scan.input, &self.delta, &self.a, &self.b].map(gpu::read));
        arguments.extend(self.delta_bias.as_ref().map(gpu::read));
        arguments.extend(self.scan.document_start.as_ref().map(gpu::read));
        arguments.push(Argument::U32(spans));
        arguments.extend(self.arguments());
        gpu::launch(OPERATOR, self.device(), &kernel, self.sizes.grid(spans - 1), &self.problem(), &arguments)?;
        drop(arguments);
        self.combine(&mut states, &sums.tensor(), self.initial_state.as_ref(), false)?;
        Ok(Some(states.tensor()))
    }

    /// What reaches the last state of each span from later ones: `None` when nothing does.
    fn carries(&self, gradient: &Tensor, last_state_gradient: Option<&Tensor>) -> Result<Option<Tensor>> {
        let spans = self.spans();
        if spans <= 1 {
            return Ok(last_state_gradient.cloned());
        }
        let (mut states, mut sums) = (self.states(spans)?, self.channels(spans)?);
        let kernel = SpanCarries(kernels::Scan { skip: false, ..self.form });
        let mut arguments = vec![states.write(), sums.write()];
        arguments.extend([gradient, &self.delta, &self.a, &self.c].map(gpu::read));
        arguments.extend(self.gate.as_ref().map(gpu::read));
        arguments.extend(self.delta_bias.as_ref().map(gpu::read));
        arguments.extend(self.scan.document_start.as_ref().map(gpu::read));
        arguments.push(Argument::U32(spans));
        arguments.extend(self.arguments());
        gpu::launch(OPERATOR, self.device(), &kernel, self.sizes.grid(spans - 1), &self.problem(), &arguments)?;
        drop(arguments);
        self.combine(&mut states, &sums.tensor(), last_state_gradient, true)?;
        Ok(Some(states.tensor()))
    }

    /// The inputs from `input` to `document_start`, as the kernels of both directions take them.
    fn inputs(&self) -> Vec<Argument<'_>> {
        let mut arguments = Vec::from([&self.scan.input, &self.delta, &self.a, &self.b, &self.c].map(gpu::read));
        let optional = [&self.d, &self.gate, &self.delta_bias, &self.scan.document_start];
        arguments.extend(optional.into_iter().flatten().map(gpu::read));
        arguments
    }

    /// There is something to scan.
    fn any(&self) -> bool {
        self.sizes.batch > 0 && self.sizes.time > 0 && self.sizes.channels > 0
    }

    /// The gradients of a, d and the bias: the sums of their parts, one per row and span.
    fn shared_gradients(
        &self,
        a: Output,
        d: Option<Output>,
        bias: Option<Output>,
    ) -> Result<(Tensor, [Option<Tensor>; 2])> {
        let vector = [self.scan.channels];
        let matrix = [self.scan.channels, self.scan.states];
        let (a, vectors) = (a.tensor(), [d, bias].map(|parts| parts.map(Output::tensor)));
        let vectors = vectors.each_ref().map(|parts| parts.as_ref().map(|parts| (parts, &vector[..])));
        gpu::column_sums_with(OPERATOR, (&a, &matrix), vectors, self.sizes.batch * self.spans())
    }

    /// Memory for the gradient of B or C as [`ScanBackward`] writes it.
    fn group_gradient(&self, like: &Tensor, way: GroupGradient, tiles: u32) -> Result<Output> {
        match way {
            GroupGradient::Whole => Output::like(like),
            GroupGradient::Tiles | GroupGradient::Pairs => {
                let parts = like.shape()[2] * way.parts(tiles) as usize;
                let shape = [self.scan.batch, self.scan.time, parts, self.scan.states];
                Output::new(self.device(), &shape, DType::F32)
            }
        }
    }

    /// The gradient of B or C from what [`ScanBackward`] wrote.
    fn group_sums(&self, written: Output, like: &Tensor, way: GroupGradient, tiles: u32) -> Result<Tensor> {
        let written = written.tensor();
        if way == GroupGradient::Whole {
            return Ok(written);
        }
        let mut sums = Output::like(like)?;
        let count = gpu::size(OPERATOR, "the number of elements of b or c", like.count())?;
        let splits = way.parts(tiles);
        let mut arguments = vec![sums.write(), gpu::read(&written)];
        arguments.extend([count, self.form.states, splits].map(Argument::U32));
        let kernel = GroupSums { element: self.form.element };
        let sizes = [u64::from(count), u64::from(splits)];
        gpu::launch(OPERATOR, self.device(), &kernel, GroupSums::grid(count.into()), &sizes, &arguments)?;
        drop(arguments);
        Ok(sums.tensor())
    }
}

/// The number of states of a channel, as kernels take it.
fn states(operator: &'static str, states: usize) -> Result<u32> {
    match u32::try_from(states) {
        Ok(states @ 1..=MOST_STATES) => Ok(states),
        _ => Err(Error::Invalid {
            operator,
            message: format!(
                "{states} states: GPUs scan channels of 1 to {MOST_STATES} states; use the CPU for others"
            ),
        }),
    }
}

/// The output, the last state, and the states at the starts of chunks (none unless they are to be saved).
pub(super) fn forward(scan: &Scan, save: bool) -> Result<(Tensor, Tensor, Tensor)> {
    let launch = Launch::new(scan)?;
    let mut output = Output::like(&scan.input)?;
    let mut last_state = Output::new(launch.device(), &[scan.batch, scan.channels, scan.states], DType::F32)?;
    if !launch.any() {
        let last_state = match &launch.initial_state {
            Some(state) => state.clone(),
            None => {
                last_state.set_zero()?;
                last_state.tensor()
            }
        };
        return Ok((output.tensor(), last_state, launch.states(0)?.tensor()));
    }
    if let Some(grid) = launch.serial_grid()? {
        let shares = launch.shares()?;
        let mut handed = shares.map(|shares| launch.handed(shares)).transpose()?;
        let mut chunk_states = launch.states(if save { launch.chunks() } else { 0 })?;
        let mut arguments = vec![output.write(), last_state.write()];
        arguments.extend(save.then(|| chunk_states.write()));
        arguments.extend(handed.iter_mut().flatten().map(Output::write));
        arguments.extend(launch.inputs());
        arguments.extend(launch.initial_state.as_ref().map(gpu::read));
        arguments.extend(shares.iter().flat_map(|shares| [shares.share, shares.chunks]).map(Argument::U32));
        arguments.extend(launch.serial_arguments());
        let (resumed, shared) = (launch.initial_state.is_some(), shares.is_some());
        let kernel = SerialForward { scan: launch.form, resumed, saves: save, shared };
        let grid = shares.map_or(grid, |shares| [shares.blocks, 1, 1]);
        gpu::launch(OPERATOR, launch.device(), &kernel, Some(grid), &launch.problem(), &arguments)?;
        drop(arguments);
        return Ok((output.tensor(), last_state.tensor(), chunk_states.tensor()));
    }
    let start_states = launch.start_states()?;
    // Where every chunk is a span, the states at their starts are known.
    let known = launch.spans() == launch.chunks() && start_states.is_some();
    let saves = save && !known;
    let mut chunk_states = launch.states(if saves { launch.chunks() } else { 0 })?;
    let mut arguments = vec![output.write(), last_state.write()];
    arguments.extend(saves.then(|| chunk_states.write()));
    arguments.extend(launch.inputs());
    arguments.extend(start_states.as_ref().map(gpu::read));
    arguments.push(Argument::U32(launch.chunk));
    arguments.extend(launch.arguments());
    let kernel = ScanForward { scan: launch.form, resumed: start_states.is_some(), saves };
    let grid = launch.sizes.grid(launch.spans());
    gpu::launch(OPERATOR, launch.device(), &kernel, grid, &launch.problem(), &arguments)?;
    drop(arguments);
    let chunk_states = match start_states {
        Some(states) if known => states,
        _ => chunk_states.tensor(),
    };
    Ok((output.tensor(), last_state.tensor(), chunk_states))
}

/// Gradients in the order input, delta, a, b, c, d, gate, delta_bias, initial_state.
pub(super) fn backward(
    scan: &Scan,
    output_gradient: Option<&Tensor>,
    last_state_gradient: Option<&Tensor>,
    chunk_states: &Tensor,
) -> Result<[Option<Tensor>; 9]> {
    let mut launch = Launch::new(scan)?;
    let serial = if launch.any() { launch.serial_grid()? } else { None };
    if serial.is_some() {
        launch.span = launch.sizes.time;
    }
    let (device, input, spans) = (launch.device(), &scan.input, launch.spans());
    let gradient = match output_gradient {
        Some(gradient) => gradient.cast(input.dtype())?,
        None => {
            let mut zeros = Output::like(input)?;
            zeros.set_zero()?;
            zeros.tensor()
        }
    };
    let last_state_gradient = last_state_gradient.map(|gradient| gradient.cast(DType::F32)).transpose()?;
    let mut state_gradient = match &launch.initial_state {
        Some(state) => Some(Output::like(state)?),
        None => None,
    };
    let (b_tiles, c_tiles) = if launch.any() { (launch.sizes.b_tiles(), launch.sizes.c_tiles()) } else { (1, 1) };
    let [b_way, c_way] = [b_tiles, c_tiles].map(|tiles| match (serial, GroupGradient::of(tiles)) {
        (Some(_), GroupGradient::Pairs) => GroupGradient::Tiles,
        (_, way) => way,
    });
    let (mut input_gradient, mut delta_gradient) = (Output::like(input)?, Output::like(&launch.delta)?);
    let mut a_parts = launch.states(spans)?;
    let mut b_gradient = launch.group_gradient(&launch.b, b_way, b_tiles)?;
    let mut c_gradient = launch.group_gradient(&launch.c, c_way, c_tiles)?;
    let mut d_parts = launch.d.as_ref().map(|_| launch.channels(spans)).transpose()?;
    let mut gate_gradient = launch.gate.as_ref().map(Output::like).transpose()?;
    let mut bias_parts = launch.delta_bias.as_ref().map(|_| launch.channels(spans)).transpose()?;
    if launch.any() {
        let carries = launch.carries(&gradient, last_state_gradient.as_ref())?;
        let mut arguments = vec![
            input_gradient.write(),
            delta_gradient.write(),
            a_parts.write(),
            b_gradient.write(),
            c_gradient.write(),
        ];
        for optional in [&mut d_parts, &mut gate_gradient, &mut bias_parts, &mut state_gradient] {
            arguments.extend(optional.as_mut().map(Output::write));
        }
        arguments.push(gpu::read(&gradient));
        arguments.extend(launch.inputs());
        arguments.push(gpu::read(chunk_states));
        arguments.extend(carries.as_ref().map(gpu::read));
        let (scan, problem) = (launch.form, launch.problem());
        let (carried, initial) = (carries.is_some(), launch.initial_state.is_some());
        if serial.is_some() {
            arguments.extend(launch.serial_arguments());
            let kernel = SerialBackward { scan, carried, initial, b: b_way, c: c_way };
            gpu::launch(OPERATOR, device, &kernel, serial, &problem, &arguments)?;
        } else {
            arguments.extend(launch.arguments());
            let kernel = ScanBackward { scan, chunk: launch.chunk, carried, initial, b: b_way, c: c_way };
            gpu::launch(OPERATOR, device, &kernel, launch.sizes.grid(spans), &problem, &arguments)?;
        }
    } else if let (Some(state_gradient), None) = (&mut state_gradient, &last_state_gradient) {
        state_gradient.set_zero()?;
    }
    let state_gradient = match (state_gradient, last_state_gradient) {
        (Some(_), Some(gradient)) if !launch.any() => Some(gradient),
        (state_gradient, _) => state_gradient.map(Output::tensor),
    };
    let like = |gradient: Tensor, input: &Tensor| gradient.cast(input.dtype());
    let (a_gradient, [d_gradient, bias_gradient]) = launch.shared_gradients(a_parts, d_parts, bias_parts)?;
    Ok([
        Some(input_gradient.tensor()),
        Some(like(delta_gradient.tensor(), &scan.delta)?),
        Some(a_gradient),
        Some(like(launch.group_sums(b_gradient, &launch.b, b_way, b_tiles)?, &scan.b)?),
        Some(like(launch.group_sums(c_gradient, &launch.c, c_way, c_tiles)?, &scan.c)?),
        d_gradient,
        match (gate_gradient, &scan.gate) {
            (Some(gradient), Some(gate)) => Some(like(gradient.tensor(), gate)?),
            _ => None,
        },
        bias_gradient,
        state_gradient,
    ])
}

pub(super) fn step(state: &mut Tensor, inputs: ScanStepInputs<'_>) -> Result<Tensor> {
    const OPERATOR: &str = "selective_scan_step";
    let input = inputs.input;
    let (device, dtype) = (input.device(), input.dtype());
    let [batch, channels] = *input.shape() else { unreachable!("the rank was checked") };
    let (b_groups, c_groups) = (inputs.b.shape()[1], inputs.c.shape()[1]);
    let size = |what, size| gpu::size(OPERATOR, what, size);
    let count = size("the number of channels of all rows", batch * channels)?;
    let kernel = ScanStep(kernels::Scan {
        element: gpu::element(dtype),
        states: states(OPERATOR, inputs.b.shape()[2])?,
        skip: inputs.d.is_some(),
        gate: inputs.gate.is_some(),
        bias: inputs.delta_bias.is_some(),
        softplus: inputs.delta_softplus,
        documents: false,
    });
    let cast = |tensor: Option<&Tensor>, dtype| tensor.map(|tensor| tensor.cast(dtype)).transpose();
    let (delta, a) = (inputs.delta.cast(dtype)?, inputs.a.cast(DType::F32)?);
    let (b, c) = (inputs.b.cast(dtype)?, inputs.c.cast(dtype)?);
    let (d, gate) = (cast(inputs.d, DType::F32)?, cast(inputs.gate, dtype)?);
    let delta_bias = cast(inputs.delta_bias, DType::F32)?;
    let mut output = Output::like(input)?;
    let mut arguments = vec![output.write(), Argument::Write(state.make_unique()?, kernels_ptx::Element::F32)];
    arguments.extend([input, &delta, &a, &b, &c].map(gpu::read));
    arguments.extend([&d, &gate, &delta_bias].into_iter().flatten().map(gpu::read));
    let channel_count = size("the number of channels", channels)?;
    let (b_width, c_width) = (size("a group of b", channels / b_groups)?, size("a group of c", channels / c_groups)?);
    arguments.extend([count, channel_count, b_width, c_width].map(Argument::U32));
    let sizes = [batch, channels, inputs.b.shape()[2], b_groups, c_groups].map(|size| size as u64);
    gpu::launch(OPERATOR, device, &kernel, ScanStep::grid(count.into()), &sizes, &arguments)?;
    drop(arguments);
    Ok(output.tensor())
}
