//! Runs the blocks of a launch, one after the other, each warp until it waits: the order, and with it every report, is the
//! same in every run.

use super::Fault;
use super::execute::{Execution, Stop};
use super::fault::Place;
use super::program::{Op, Program};
use super::shadow::{LANES, WARPS, Who};
use super::spaces::{Checked, Memory, OtherThread, Raised};
use super::warp::{BlockPlace, State, Warp};

/// Instructions that a warp may run in one block, unless a caller allows less: minutes of work.
pub(super) const BUDGET: u64 = 1 << 30;

/// A launch while it runs.
pub(super) struct Running<'x, 'r> {
    pub program: &'x Program,
    pub memory: Memory<'r>,
    pub warps: Vec<Warp>,
    pub budget: u64,
    /// How often each instruction ran, for statistics.
    pub counts: Vec<u64>,
    /// The first phase of each block that began.
    phases: Vec<u32>,
}

/// A barrier of a block.
#[derive(Clone, Copy)]
struct Barrier {
    /// Warps that wait there.
    waiting: u32,
    /// Warps that arrived.
    arrived: u32,
    /// How many warps meet there.
    wanted: u32,
    /// What those that do not wait told by arriving.
    told: [u32; WARPS],
}

const NOBODY: Barrier = Barrier { waiting: 0, arrived: 0, wanted: 0, told: [0; WARPS] };

impl<'x, 'r> Running<'x, 'r> {
    /// `parameters`: the value of each parameter.
    pub fn new(program: &'x Program, memory: Memory<'r>, extents: [u32; 3], parameters: &[u64], budget: u64) -> Self {
        let warps = extents.iter().product::<u32>().div_ceil(LANES as u32) as usize;
        Self {
            program,
            memory,
            warps: (0..warps).map(|index| Warp::new(program, index, parameters)).collect(),
            budget,
            counts: vec![0; program.instructions.len()],
            phases: Vec::new(),
        }
    }

    /// Runs all blocks of a grid.
    ///
    /// # Errors
    /// The first fault.
    pub fn grid(&mut self, grid: [u32; 3], extents: [u32; 3]) -> Result<(), Box<Fault>> {
        let [x, y, z] = grid;
        for block_z in 0..z {
            for block_y in 0..y {
                for block_x in 0..x {
                    let place = BlockPlace { grid, extents, block: [block_x, block_y, block_z] };
                    self.phases.push(self.memory.clock.begin_block(self.warps.len()));
                    for warp in &mut self.warps {
                        warp.begin(self.program, &place, self.budget);
                    }
                    self.block(&place).map_err(|(warp, raised)| self.fault(&place, warp, *raised))?;
                }
            }
        }
        Ok(())
    }

    /// Runs one block; on a fault, the warp that it is of.
    fn block(&mut self, place: &BlockPlace) -> Result<(), (usize, Box<Raised>)> {
        let mut barriers = [NOBODY; 16];
        loop {
            let mut progress = false;
            'warps: for index in 0..self.warps.len() {
                while self.warps[index].state == State::Running {
                    progress = true;
                    let warp = &mut self.warps[index];
                    let memory = &mut self.memory;
                    let mut execution = Execution { program: self.program, warp, memory, counts: &mut self.counts };
                    let stop = execution.run().map_err(|raised| (index, raised))?;
                    if let Stop::Barrier { id, count, waits } = stop {
                        let barrier = &mut barriers[id as usize];
                        if self.arrive(index, barrier, count, waits).map_err(|raised| (index, raised))? {
                            // Those that waited go on from the first warp.
                            break 'warps;
                        }
                    }
                }
            }
            if self.warps.iter().all(|warp| warp.state == State::Finished) {
                self.end_copies();
                return Ok(());
            }
            if !progress {
                return Err(self.stuck(place));
            }
        }
    }

    /// Ends the copies that nothing waited for: the next block's shared memory is another.
    fn end_copies(&mut self) {
        for warp in &mut self.warps {
            while let Some(copy) = warp.copies.pop_front() {
                self.memory.shared.finish(&self.memory.clock, copy.who, copy.lanes, copy.bytes, &copy.places);
            }
        }
    }

    /// A warp arrives at a barrier; when it is the last, those that wait go on. Returns whether they do.
    fn arrive(&mut self, index: usize, barrier: &mut Barrier, count: Option<u32>, waits: bool) -> Checked<bool> {
        let wanted = count.map_or(self.warps.len() as u32, |count| count / LANES as u32);
        let warp = &mut self.warps[index];
        if count.is_none() && warp.alive != warp.all {
            warp.at -= 1;
            let gone = warp.all & !warp.alive;
            let problem = format!(
                "waits for the whole block, but threads of its own warp exited before (lanes {gone:#010x}): they never come"
            );
            return Err(Raised::new(warp.alive.trailing_zeros() as usize, problem));
        }
        if barrier.arrived > 0 && barrier.wanted != wanted {
            warp.at -= 1;
            let threads = |warps: u32| warps * LANES as u32;
            let problem = format!(
                "wants {} threads to meet at this barrier, but others that wait there want {}",
                threads(wanted),
                threads(barrier.wanted)
            );
            return Err(Raised::new(0, problem));
        }
        if waits && barrier.waiting != 0 {
            self.check_aligned(index, barrier.waiting.trailing_zeros() as usize)?;
        }
        barrier.wanted = wanted;
        barrier.arrived += 1;
        if waits {
            barrier.waiting |= 1 << index;
        } else {
            let told = self.memory.clock.arrive(index);
            barrier.told.iter_mut().zip(told).for_each(|(own, told)| *own = (*own).max(told));
        }
        if barrier.arrived >= wanted {
            self.memory.clock.synchronise(barrier.waiting, &barrier.told);
            for (index, warp) in self.warps.iter_mut().enumerate() {
                if barrier.waiting >> index & 1 == 1 {
                    warp.state = State::Running;
                }
            }
            *barrier = NOBODY;
            return Ok(true);
        }
        Ok(false)
    }

    /// Warps may wait at one barrier from different instructions only where none of them is aligned. The instruction set asks
    /// that of the threads of a warp alone; compute-sanitizer's synccheck calls such threads of a block divergent. Those that
    /// only arrive are not asked: their instruction is another one than that of those that wait for them. If one who waits
    /// differs from any other, it differs from the first.
    fn check_aligned(&mut self, index: usize, first: usize) -> Checked<()> {
        let [own, other] = [index, first].map(|warp| self.warps[warp].at - 1);
        let aligned = |at: usize| matches!(self.program.instructions[at].op, Op::Barrier { aligned: true, .. });
        if own == other || !(aligned(own) || aligned(other)) {
            return Ok(());
        }
        let warp = &mut self.warps[index];
        warp.at = own;
        Err(Box::new(Raised {
            lane: warp.alive.trailing_zeros() as usize & 31,
            problem: "waits at an aligned barrier from another instruction than others that wait there (barrier.sync without \
                      .aligned allows that): "
                .to_owned(),
            other: Some(OtherThread { who: Who::new(other, first, false), phase: None }),
        }))
    }

    /// The fault of warps that wait for others which never come.
    #[cold]
    fn stuck(&mut self, place: &BlockPlace) -> (usize, Box<Raised>) {
        let waits = |warp: &Warp| match warp.state {
            State::Waiting(id) => Some(id),
            _ => None,
        };
        let Some((index, id)) = self.warps.iter().enumerate().find_map(|(index, warp)| Some((index, waits(warp)?)))
        else {
            return (0, Raised::new(0, "no warp can go on".to_owned()));
        };
        let others = self.warps.iter().filter(|warp| waits(warp) != Some(id));
        let missing: Vec<String> = others
            .map(|warp| {
                let thread = Place(place.thread(warp.index, 0));
                match waits(warp) {
                    Some(other) => {
                        let line = self.program.places[warp.at - 1].line;
                        format!("thread {thread} and its warp wait at barrier {other} (line {line})")
                    }
                    None => format!("thread {thread} and its warp exited"),
                }
            })
            .take(3)
            .collect();
        let warp = &mut self.warps[index];
        warp.at -= 1;
        let problem = format!("waits at barrier {id} for threads that never come: {}", missing.join("; "));
        (index, Raised::new(warp.alive.trailing_zeros() as usize & 31, problem))
    }

    /// The fault as it is reported.
    fn fault(&self, place: &BlockPlace, warp: usize, raised: Raised) -> Box<Fault> {
        let Raised { lane, mut problem, other } = raised;
        if let Some(OtherThread { who, phase }) = other {
            problem += &format!("thread {}", Place(place.thread(who.warp(), who.lane())));
            if let Some(phase) = phase {
                let [x, y, _] = place.grid;
                let number = self.phases.partition_point(|&first| first <= phase).saturating_sub(1) as u32;
                problem += &format!(" of block {}", Place([number % x, number / x % y, number / x / y]));
            }
            problem += &format!(" at line {}", self.line(who.instruction()));
        }
        let line = self.line(self.warps[warp].at);
        Box::new(Fault {
            kernel: self.program.name.clone(),
            line,
            source: self.program.text.lines().nth(line - 1).unwrap_or_default().trim().to_owned(),
            place: Some((place.block, place.thread(warp, lane))),
            problem,
        })
    }

    fn line(&self, instruction: usize) -> usize {
        self.program.places.get(instruction).map_or(1, |place| place.line as usize).max(1)
    }
}
