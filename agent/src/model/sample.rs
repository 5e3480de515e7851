//! Samples, and the process that an event is about.

use std::{ops::Range, sync::Arc};

use super::{ImageKey, ProcessKey, RawLists, TaskLabels};

/// The process and the image that an event is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subject {
    /// The process of the sample or event.
    pub key: ProcessKey,
    /// The image: the kernel's count of the process's `execve` calls.
    pub exec_id: u32,
    /// Time of the event: nanoseconds of the boot clock.
    pub ktime_ns: u64,
    /// Inode number of the process's control group.
    pub cgroup_id: u64,
    /// Command name; of a sample the thread's.
    pub comm: String,
    /// The rules that match the process, one bit for each slot.
    pub rules: u64,
    /// The rules that match as far as the kernel side can tell, one bit for each slot: the agent decides. 0 in a sample.
    pub candidates: u64,
}

impl ImageKey {
    /// Returns the image that an event is about.
    pub fn of(subject: &Subject) -> Self {
        Self { process: subject.key, exec_id: subject.exec_id }
    }
}

/// The parent and the user of a process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Origin {
    /// Thread group id of the parent; of a fork, of its caller.
    pub parent: u32,
    /// Effective user id.
    pub uid: u32,
}

/// A file by its device and inode number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FileNumbers {
    /// Device number, as `stat(2)` returns it.
    pub dev: u64,
    /// Inode number on that device.
    pub inode: u64,
}

/// How a process ended, in the form of `wait(2)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitStatus(pub u32);

impl ExitStatus {
    /// Returns the argument of `exit`.
    pub fn code(self) -> u32 {
        self.0 >> 8 & 0xff
    }

    /// Returns the signal that ended the process; 0 for none.
    pub fn signal(self) -> u32 {
        self.0 & 0x7f
    }
}

/// The measure of a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SampleKind {
    /// A tick of the sampling clock interrupted the thread on a CPU.
    OnCpu,
    /// The thread was switched out, and came back.
    OffCpu,
}

/// How unwinding a user stack ended. Every end but `Complete` and `None` shows as a marked frame at the root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StackEnd {
    /// At the thread's first frame.
    Complete,
    /// There is no user stack (a kernel thread), or no rule asked for it.
    None,
    /// At the limit of frames.
    Truncated,
    /// At an address from which the unwinder could not go on.
    Broken,
    /// At memory of the stack that could not be read: swapped out, never touched, or protected.
    Unreadable,
    /// A 32-bit program: its stack is not unwound.
    NotUnwound,
}

/// Marks of a stack, beside how it ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct StackMarks {
    /// The kernel stack has more frames than the sample holds.
    pub kernel_truncated: bool,
    /// The index in `user` of the first frame that the unwinder found by a guess: by frame pointer, where no unwind table had a
    /// rule. That frame and its callers may be wrong.
    pub guessed_from: Option<u16>,
}

/// One sampled stack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// The sampled process.
    pub subject: Subject,
    /// The sampled thread.
    pub tid: u32,
    /// The measure: time on a CPU or blocked.
    pub kind: SampleKind,
    /// On CPU: nanoseconds between two ticks. Off CPU: nanoseconds blocked.
    pub value_ns: u64,
    /// Kernel addresses, leaf first.
    pub kernel: Vec<u64>,
    /// User addresses, leaf first.
    pub user: Vec<u64>,
    /// How unwinding the user stack ended.
    pub end: StackEnd,
    /// The same as the kernel side reports it: `enum user_stack_end` of gannet.h.
    pub end_code: u8,
    /// Marks of both stacks.
    pub marks: StackMarks,
    /// Of an off-CPU sample: the low bits of the state in which the thread slept.
    pub state: u8,
    /// The number of the layout by which its list frames were taken; 0 if it has none.
    pub list_layout: u8,
    /// Labels that the program gave the task that ran.
    pub labels: Option<Arc<TaskLabels>>,
    /// The input for an unwinder in user space, if the kernel side could not unwind; `user` is empty then.
    pub raw: Option<Box<RawUserStack>>,
}

impl Sample {
    /// Reports whether neither stack could be read: there is nothing that the sample could show.
    pub(crate) fn is_unreadable(&self) -> bool {
        let has_stack = self.raw.is_some() || !self.user.is_empty() || !self.kernel.is_empty();
        matches!(self.end, StackEnd::Broken | StackEnd::Unreadable) && !has_stack
    }
}

/// The registers and the stack of a thread that the kernel side could not unwind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawUserStack {
    /// The program counter.
    pub pc: u64,
    /// The registers by DWARF number.
    pub registers: Vec<u64>,
    /// Memory from the stack pointer upwards, as far as it could be read.
    pub stack: Vec<u8>,
    /// Addresses that could not be read. In `stack` there are zeros in their place, unless it ends before.
    pub unread: Vec<Range<u64>>,
    /// The list frames of the thread.
    pub lists: Option<RawLists>,
    /// By the boot clock: until then at least the thread had this stack, and the functions on it lived.
    pub live_until_ns: u64,
}
