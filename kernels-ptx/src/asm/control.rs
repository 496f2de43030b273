//! Branches and loops.

use super::print::{Line, Piece};
use super::value::{Operand, Pred, U32, Value, Variable};
use super::{Assembler, LANES};

impl Assembler {
    /// Runs `then` where the condition holds.
    pub fn if_(&self, condition: Value<'_, Pred>, then: impl FnOnce()) {
        let end = self.label();
        self.branch(Some((condition, false)), &end);
        self.indented(then);
        self.place(end);
    }

    /// Runs `then` where the condition holds, and `otherwise` elsewhere.
    pub fn if_else(&self, condition: Value<'_, Pred>, then: impl FnOnce(), otherwise: impl FnOnce()) {
        let (other, end) = (self.label(), self.label());
        self.branch(Some((condition, false)), &other);
        self.indented(then);
        self.branch(None, &end);
        self.place(other);
        self.indented(otherwise);
        self.place(end);
    }

    /// Runs `body` with `start`, `start + step`, … while below `end`.
    pub fn for_<'a>(
        &'a self,
        start: impl Operand<'a, U32>,
        end: impl Operand<'a, U32>,
        step: impl Operand<'a, U32>,
        body: impl FnOnce(Value<'a, U32>),
    ) {
        let index: Variable<'a, U32> = self.variable(start);
        self.while_(
            || index.get().lt(end),
            || {
                body(index.get());
                index.set(index.get() + step);
            },
        );
    }

    /// Runs `body` while `condition`, computed before each round, holds.
    pub fn while_<'a>(&'a self, condition: impl Fn() -> Value<'a, Pred>, body: impl FnOnce()) {
        let (again, end) = (self.label(), self.label());
        self.branch(Some((condition(), false)), &end);
        self.place(again.clone());
        self.indented(|| {
            body();
            let more = condition();
            self.branch(Some((more, true)), &again);
        });
        self.place(end);
    }

    /// Ends the threads where the condition holds. No barrier may follow.
    pub fn return_if(&self, condition: Value<'_, Pred>) {
        self.push(Line::instruction("ret", Vec::new()).when(condition.id, true));
    }

    /// Waits until every thread of the block is here; what they wrote to shared and global memory is seen afterwards.
    pub fn barrier(&self) {
        self.emit_effect("bar.sync", vec![Piece::text("0")]);
    }

    /// The same for warps that come from different places in the text, `threads` in all: warps that share out the work of a
    /// block. Each such meeting wants an `id` of its own, from 1 to 15; it may lie in a register. `bar.sync` would not do: it
    /// is the aligned form, and compute-sanitizer's synccheck and the simulator report warps that wait there from different
    /// instructions.
    pub fn meet<'a>(&'a self, id: impl Operand<'a, U32>, threads: u32) {
        self.emit_meeting("barrier.sync", id, threads);
    }

    /// Tells those that [`meet`](Self::meet) by this `id` that the warp has come, and does not wait for them: they see
    /// what it wrote before, and it has read what it read. It may not come again before they have gone on.
    pub fn arrive<'a>(&'a self, id: impl Operand<'a, U32>, threads: u32) {
        self.emit_meeting("barrier.arrive", id, threads);
    }

    fn emit_meeting<'a>(&'a self, opcode: &str, id: impl Operand<'a, U32>, threads: u32) {
        let id = id.operand().0;
        let known = if let Piece::Text(number) = &id { number.parse().ok() } else { None };
        let fits = known.is_none_or(|number: u32| (1..16).contains(&number));
        assert!(fits && threads.is_multiple_of(LANES), "barrier {known:?} of {threads} threads");
        self.emit_effect(opcode, vec![id, Piece::text(&threads.to_string())]);
    }

    /// Waits until the lanes of the warp are here; what they wrote to shared memory is seen by the warp afterwards.
    pub fn warp_barrier(&self) {
        self.emit_effect("bar.warp.sync", vec![Piece::text("0xffffffff")]);
    }

    /// Orders what the thread has done before and what it does after, for all blocks. A block that sees a flag
    /// ([`load_flag`](super::Address::load_flag)) and then passes here sees what was written before another block passed here
    /// and then set it.
    pub fn fence(&self) {
        self.emit_effect("fence.acq_rel.gpu", Vec::new());
    }

    fn branch(&self, condition: Option<(Value<'_, Pred>, bool)>, label: &str) {
        let line = Line::instruction("bra", vec![Piece::text(label)]);
        self.push(match condition {
            Some((condition, holds)) => line.when(condition.id, holds),
            None => line,
        });
    }

    fn place(&self, label: String) {
        self.push(Line::Label(label));
    }
}
