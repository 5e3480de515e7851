//! The ring buffer through which the BPF programs report events.

use std::{
    cell::RefCell,
    mem,
    os::fd::{BorrowedFd, RawFd},
    rc::Rc,
};

use libbpf_rs::{MapCore, RingBuffer, RingBufferBuilder};

use super::{Event, KernelError};

/// The return code with which the callback of `ring_buffer__consume` ends a read.
const STOP: i32 = -libc::ECANCELED;

/// The reader of the ring buffer.
pub(super) struct EventRing {
    ring: RingBuffer<'static>,
    queue: Rc<RefCell<Queue>>,
    bytes: usize,
}

/// Events of the read that is in progress.
#[derive(Default)]
struct Queue {
    events: Vec<Event>,
    undecodable: u64,
    /// Bytes that this read may still take.
    left_bytes: usize,
}

impl Queue {
    /// Takes one record. Returns [`STOP`] if it is the last one of this read.
    fn take(&mut self, bytes: &[u8]) -> i32 {
        match Event::decode(bytes) {
            Ok(event) => self.events.push(event),
            Err(error) => {
                self.undecodable += 1;
                tracing::debug!("cannot decode an event: {error}");
            }
        }
        self.left_bytes = self.left_bytes.saturating_sub(bytes.len());
        if self.left_bytes == 0 { STOP } else { 0 }
    }
}

impl EventRing {
    /// Opens the reader of a ring buffer of this size.
    pub(super) fn open(events: &dyn MapCore, bytes: u32) -> Result<Self, KernelError> {
        let queue = Rc::new(RefCell::new(Queue::default()));
        let writer = Rc::clone(&queue);
        let mut builder = RingBufferBuilder::new();
        builder.add(events, move |record| writer.borrow_mut().take(record)).map_err(KernelError::Ring)?;
        Ok(Self { ring: builder.build().map_err(KernelError::Ring)?, queue, bytes: bytes as usize })
    }

    /// Reads the pending events in the kernel's order. Does not block, and takes no more than the ring buffer can hold: where
    /// this process gets too little CPU time, the programs would otherwise write faster than it reads, for ever.
    pub(super) fn read(&mut self) -> Result<Vec<Event>, KernelError> {
        self.queue.borrow_mut().left_bytes = self.bytes;
        let result = self.ring.consume_raw();
        if result < 0 && result != STOP {
            return Err(KernelError::Ring(libbpf_rs::Error::from_raw_os_error(-result)));
        }
        Ok(mem::take(&mut self.queue.borrow_mut().events))
    }

    /// Returns the number of records that were no event. Anything but 0 means that agent and BPF programs differ.
    pub(super) fn undecodable(&self) -> u64 {
        self.queue.borrow().undecodable
    }

    /// Returns a descriptor that is readable when the programs ask for a read before the reader's own time.
    pub(super) fn wake_fd(&self) -> BorrowedFd<'_> {
        let fd: RawFd = self.ring.epoll_fd();
        // SAFETY: the ring buffer owns the descriptor and lives as long as the borrow.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_ends_when_it_has_taken_a_complete_ring() {
        let mut queue = Queue { left_bytes: 100, ..Queue::default() };
        assert_eq!(
            (queue.take(&[0xff; 60]), queue.take(&[0xff; 60]), queue.take(&[0xff; 60])),
            (0, STOP, STOP)
        );
        assert_eq!(queue.undecodable, 3);
    }
}
