//! A memory map of a file that somebody cuts short makes a SIGBUS where the missing part is read, and that ends the
//! whole program. The files that are mapped here belong to whoever runs on the node, so it must not.

use std::{
    cell::Cell,
    io,
    sync::{
        OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

thread_local! {
    // `const` and without a destructor, so that the handler's access is a plain load.
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

static FAULTS: AtomicU64 = AtomicU64::new(0);
static PAGE_BYTES: AtomicU64 = AtomicU64::new(4096);
static INSTALLED: OnceLock<io::Result<()>> = OnceLock::new();

/// From now on a missing page of a mapped file reads as zeros in this thread.
pub(super) fn guard_this_thread() -> io::Result<()> {
    PAGE_BYTES.store(rustix::param::page_size() as u64, Ordering::Relaxed);
    let installed = INSTALLED.get_or_init(|| {
        // SAFETY: an all-zero sigaction is a valid one; every field that matters is set below.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_bus_error as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: the handler only does what is allowed in a signal handler: it reads a thread-local without
        // destructor, adds to an atomic and makes system calls.
        if unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) } == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    });
    if let Err(error) = installed {
        return Err(io::Error::new(error.kind(), error.to_string()));
    }
    GUARDED.set(true);
    Ok(())
}

/// Missing pages met so far, in all guarded threads.
pub(super) fn faults() -> u64 {
    FAULTS.load(Ordering::Relaxed)
}

extern "C" fn on_bus_error(signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid siginfo_t to a handler that asked for it, and fills in the address for SIGBUS.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as u64) };
    if GUARDED.get() && code == libc::BUS_ADRERR {
        let page_bytes = PAGE_BYTES.load(Ordering::Relaxed);
        let page = address & !(page_bytes - 1);
        // SAFETY: the page is part of a private read-only map of a file (nothing else raises BUS_ADRERR in a guarded
        // thread) and cannot be read as it is; a page of zeros in its place changes nothing that could be relied on.
        let placed = unsafe {
            libc::mmap(
                page as *mut libc::c_void,
                page_bytes as usize,
                libc::PROT_READ,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
                -1,
                0,
            )
        };
        if placed != libc::MAP_FAILED {
            FAULTS.fetch_add(1, Ordering::Relaxed);
            return;
        }
    }
    // Not ours: with the default action in place the instruction is tried again, and ends the program as it should.
    // SAFETY: SIG_DFL is a valid disposition for the signal that is being handled.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}

#[cfg(test)]
mod tests {
    use std::{fs, os::fd::AsRawFd, thread};

    use super::*;

    #[test]
    fn the_missing_part_of_a_file_reads_as_zeros_in_a_guarded_thread() {
        let file = tempfile::tempfile().unwrap();
        fs::File::set_len(&file, 8192).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[7; 8192], 0).unwrap();
        let read = thread::spawn(move || {
            guard_this_thread().unwrap();
            // SAFETY: a new mapping of a whole file, read only through the pointer below.
            let map = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    8192,
                    libc::PROT_READ,
                    libc::MAP_PRIVATE,
                    file.as_raw_fd(),
                    0,
                )
            };
            assert_ne!(map, libc::MAP_FAILED);
            file.set_len(4096).unwrap();
            let before = faults();
            // SAFETY: both addresses are inside of the mapping; the second has no page behind it, which is the test.
            let bytes = unsafe { (*map.cast::<u8>(), *map.cast::<u8>().add(5000)) };
            (bytes, faults() - before)
        });
        assert_eq!(read.join().unwrap(), ((7, 0), 1));
    }
}
