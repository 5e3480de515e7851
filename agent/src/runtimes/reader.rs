//! Readers of generated code: what each runtime says of its own.

use std::{fmt::Debug, ops::Range};

use gannet_unwind::{generated::Rows, unwind::GeneratedFrame};

use super::{
    FunctionText, Memory, WhyNot,
    unloads::{Replacements, Unloads},
};

/// Reads the code that one process makes.
pub(crate) trait CodeReader: Send + Sync + Debug {
    /// Returns the ranges that hold the code. It is called at the begin of each request, and the other methods use what it read.
    fn ranges(&self, memory: &dyn Memory) -> Result<Vec<Range<u64>>, WhyNot>;

    /// Finds the block that holds an address; `None` if none does.
    fn find(&self, address: u64, memory: &dyn Memory) -> Result<Option<BlockHead>, WhyNot>;

    /// Reads the code of a block.
    fn read(&self, head: &BlockHead, memory: &dyn Memory) -> Result<CodeBlock, WhyNot>;

    /// Returns the functions that the code at an address of a block stands for, innermost first. A return address is that of
    /// the call before it.
    fn scope(&self, head: &BlockHead, address: u64, memory: &dyn Memory) -> Result<Scope, WhyNot>;

    /// Returns what a frame says of its function, for blocks of which [`CodeBlock::frames`] says that they do.
    fn named(&self, frame: &GeneratedFrame<'_>) -> Option<NamedFrame> {
        let _ = frame;
        None
    }

    /// Reports whether all code keeps frame pointers, so that unknown code does not hide its callers.
    fn has_frame_pointers(&self) -> bool {
        false
    }

    /// Reads how many classes the process has unloaded, or how often it has moved its objects. It is called at the begin and at the
    /// end of each request.
    fn unloads(&self, memory: &dyn Memory) -> Unloads;

    /// Reads how often the process has replaced functions that live on. It is called with [`CodeReader::unloads`].
    fn replacements(&self, memory: &dyn Memory) -> Replacements {
        let _ = memory;
        Replacements::NONE
    }

    /// Reads a function by the address of its object. `hint` is that of [`NamedFrame::hint`], or 0.
    fn function(&self, object: u64, hint: u64, memory: &dyn Memory) -> Result<CodeFunction, WhyNot>;
}

/// A block of code, as it shows when it is found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BlockHead {
    /// Address of its description.
    pub(crate) at: u64,
    /// Addresses of the instructions.
    pub(crate) code: Range<u64>,
    /// Words by which it differs from any other block at this place.
    pub(crate) identity: [u64; 4],
    /// The number of the time since the machine may last have moved objects: in another one the agent reads the block again. 0 if
    /// the machine never moves it.
    pub(crate) epoch: u32,
    /// The name; empty if it stands for functions.
    pub(crate) name: String,
}

/// The words of a frame that say what function it is of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NamedFrame {
    pub(crate) object: u64,
    /// An address at which the reader may find more of it. It is no part of what the function is.
    pub(crate) hint: u64,
    pub(crate) position: u32,
}

/// The parts of a function that the frames of a block have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum FrameWords {
    #[default]
    None,
    /// The function; the position is that of the program counter in the scope.
    WithoutPosition,
    WithPosition,
}

/// How the frames of a block are read.
#[derive(Debug, Default)]
pub(crate) struct CodeBlock {
    /// The rules, in the order of their addresses.
    pub(crate) rows: Rows,
    /// Its frames name their function themselves.
    pub(crate) captured: Option<Captured>,
    /// The same, by [`CodeReader::named`].
    pub(crate) frames: FrameWords,
    /// Return addresses that stand for the one at this distance from the stack pointer.
    pub(crate) moved: (Vec<u64>, i32),
}

/// The words of a frame that are its function and its position.
#[derive(Debug)]
pub(crate) struct Captured {
    /// Distances from the frame pointer.
    pub(crate) function: i64,
    pub(crate) position: i64,
    /// Code in which the frame is being made: the function is in rbx, and is at its begin.
    pub(crate) entries: Vec<Range<u64>>,
}

impl Captured {
    pub(super) fn is_entry(&self, frame: &GeneratedFrame<'_>) -> bool {
        frame.exact && self.entries.iter().any(|range| range.contains(&frame.pc))
    }
}

/// Functions at the addresses of a range, innermost first: object and position.
#[derive(Debug)]
pub(crate) struct Scope {
    /// The last address is the end of the range.
    pub(crate) over: Range<u64>,
    pub(crate) functions: Vec<(u64, u32)>,
}

/// A function that code stands for.
#[derive(Debug)]
pub(crate) struct CodeFunction {
    pub(crate) text: FunctionText,
    /// The positions that frames may have: addresses of its instructions.
    pub(crate) instructions: Range<u64>,
}
