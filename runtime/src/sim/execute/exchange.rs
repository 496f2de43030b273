//! What the lanes of a warp do together: shuffles, votes and reductions.

use super::super::program::{ReduceOp, ShuffleMode, VoteOp};
use super::super::shadow::LANES;
use super::super::spaces::{Checked, Raised, each};

type W = [u32; LANES];

/// Checks that every lane that runs names the same members, and that they are just the lanes that run.
pub(super) fn check_members(members: &W, lanes: u32, name: &str) -> Checked<()> {
    let first = lanes.trailing_zeros() as usize & 31;
    let named = members[first];
    if let Some(lane) = each(lanes).find(|&lane| members[lane] != named) {
        let problem = format!(
            "{name} with the member mask {:#010x}, but lane {first} of the warp has {named:#010x}: all members must name the \
             same",
            members[lane]
        );
        return Err(Raised::new(lane, problem));
    }
    if let Some(lane) = each(lanes & !named).next() {
        let problem = format!("{name} with the member mask {named:#010x}, which leaves this lane ({lane}) out");
        return Err(Raised::new(lane, problem));
    }
    if named & !lanes != 0 {
        let problem = format!(
            "{name} with the member mask {named:#010x}, but only the lanes {lanes:#010x} are here: the others exited, or are \
             elsewhere"
        );
        return Err(Raised::new(first, problem));
    }
    Ok(())
}

/// The lane that each lane receives from, and whether that lies within bounds; lanes out of bounds receive their own.
fn sources(mode: ShuffleMode, b: &W, c: &W) -> ([usize; LANES], u32) {
    let mut inside = 0;
    let sources = std::array::from_fn(|lane| {
        let (shift, clamp, segment) = (b[lane] & 31, c[lane] & 31, c[lane] >> 8 & 31);
        let own = lane as u32;
        let greatest = own & segment | clamp & !segment;
        let least = own & segment;
        let (source, valid) = match mode {
            ShuffleMode::Up => (own.wrapping_sub(shift), own as i32 - shift as i32 >= greatest as i32),
            ShuffleMode::Down => (own + shift, own + shift <= greatest),
            ShuffleMode::Butterfly => (own ^ shift, own ^ shift <= greatest),
            ShuffleMode::Index => (least | shift & !segment, least | shift & !segment <= greatest),
        };
        inside |= u32::from(valid) << lane;
        if valid { source as usize % LANES } else { lane }
    });
    (sources, inside)
}

/// The shuffled values, and the lanes whose source is within bounds.
pub(super) fn shuffle(mode: ShuffleMode, a: &W, b: &W, c: &W, lanes: u32) -> Checked<(W, u32)> {
    let (sources, inside) = sources(mode, b, c);
    if let Some(lane) = each(lanes).find(|&lane| lanes >> sources[lane] & 1 == 0) {
        let problem = format!("shfl.sync from lane {}, which takes no part", sources[lane]);
        return Err(Raised::new(lane, problem));
    }
    Ok((std::array::from_fn(|lane| a[sources[lane]]), inside))
}

/// The result of a vote, as one bit per lane; of a ballot, as the value that every lane gets.
pub(super) fn vote(op: VoteOp, condition: u32, lanes: u32) -> u32 {
    let holds = condition & lanes;
    let truth = match op {
        VoteOp::Ballot => return holds,
        VoteOp::Any => holds != 0,
        VoteOp::All => holds == lanes,
        VoteOp::Uniform => holds == 0 || holds == lanes,
    };
    if truth { u32::MAX } else { 0 }
}

/// The reduction over the lanes.
pub(super) fn reduce(op: ReduceOp, a: &W, lanes: u32) -> u32 {
    let combine = |x: u32, y: u32| match op {
        ReduceOp::Add => x.wrapping_add(y),
        ReduceOp::MinU => x.min(y),
        ReduceOp::MinS => (x as i32).min(y as i32) as u32,
        ReduceOp::MaxU => x.max(y),
        ReduceOp::MaxS => (x as i32).max(y as i32) as u32,
        ReduceOp::And => x & y,
        ReduceOp::Or => x | y,
        ReduceOp::Xor => x ^ y,
    };
    each(lanes).map(|lane| a[lane]).reduce(combine).unwrap_or(0)
}
