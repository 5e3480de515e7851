//! CPUs that went offline, from the kernel's device events.
//!
//! A perf event of a CPU that goes offline is over, and stays silent when the CPU comes back. The list of online CPUs does not
//! show a CPU that went off and on between two readings, but the kernel reports each device event on a netlink socket.

use std::{
    collections::BTreeSet,
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

/// Device events that one reading takes at most; the next one takes the others.
const MAX_EVENTS: usize = 4096;
/// The kernel's own limit for one event is 2 KiB of variables behind the path.
const MAX_EVENT_BYTES: usize = 8 << 10;
/// The multicast group of the kernel's own events; group 2 is for udev's.
const KERNEL_EVENTS: u32 = 1;

/// A socket that receives device events.
pub(super) struct Hotplug {
    socket: OwnedFd,
}

/// The CPUs that went offline since the last reading.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum WentOffline {
    These(BTreeSet<u32>),
    /// Events were lost: any CPU may have been offline.
    Unknown,
}

impl WentOffline {
    /// Reports whether this CPU went offline, or may have.
    pub(super) fn contains(&self, cpu: u32) -> bool {
        match self {
            Self::These(cpus) => cpus.contains(&cpu),
            Self::Unknown => true,
        }
    }
}

impl Hotplug {
    /// Starts to receive events.
    pub(super) fn start() -> io::Result<Self> {
        let kind = libc::SOCK_DGRAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // SAFETY: it takes numbers alone.
        let socket = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_KOBJECT_UEVENT) };
        if socket < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call above made the descriptor, and nothing else owns it.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        // SAFETY: all bytes of the structure may be zero.
        let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        address.nl_family = libc::AF_NETLINK as libc::sa_family_t;
        address.nl_groups = KERNEL_EVENTS;
        let size = size_of_val(&address) as libc::socklen_t;
        // SAFETY: the address is a structure of this size, which the kernel only reads.
        let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size) };
        if bound < 0 { Err(io::Error::last_os_error()) } else { Ok(Self { socket }) }
    }

    /// Returns the CPUs that went offline since the last call. Does not block.
    pub(super) fn read(&mut self) -> WentOffline {
        let mut cpus = BTreeSet::new();
        let mut bytes = [0; MAX_EVENT_BYTES];
        for _ in 0..MAX_EVENTS {
            // SAFETY: all bytes of the structure may be zero.
            let mut sender: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
            let mut size = size_of_val(&sender) as libc::socklen_t;
            // SAFETY: both buffers live through the call, and the kernel gets their sizes.
            let received = unsafe {
                libc::recvfrom(
                    self.socket.as_raw_fd(),
                    bytes.as_mut_ptr().cast(),
                    bytes.len(),
                    0,
                    (&raw mut sender).cast(),
                    &raw mut size,
                )
            };
            let Ok(received) = usize::try_from(received) else {
                let error = io::Error::last_os_error();
                return match error.raw_os_error() {
                    Some(libc::EAGAIN | libc::EINTR) => WentOffline::These(cpus),
                    // The socket's buffer was full.
                    _ => WentOffline::Unknown,
                };
            };
            // Privileged processes can send to the group too.
            if sender.nl_pid == 0 {
                cpus.extend(bytes.get(..received).and_then(offline_cpu));
            }
        }
        WentOffline::These(cpus)
    }
}

/// Returns the CPU of an event by which a CPU went offline. An event is texts that end with 0; the first one is action and
/// device.
fn offline_cpu(event: &[u8]) -> Option<u32> {
    let head = event.split(|byte| *byte == 0).next()?;
    std::str::from_utf8(head.strip_prefix(b"offline@/devices/system/cpu/cpu")?).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_cpus_that_go_offline_are_found() {
        let of = |text: &str| offline_cpu(text.as_bytes());
        assert_eq!(of("offline@/devices/system/cpu/cpu12\0ACTION=offline\0SUBSYSTEM=cpu\0"), Some(12));
        for other in [
            "",
            "online@/devices/system/cpu/cpu1\0ACTION=online\0",
            "offline@/devices/system/memory/memory3\0",
            "offline@/devices/system/cpu/cpu\0",
            "offline@/devices/system/cpu/cpu1/cache\0",
            "change@/devices/x\0offline@/devices/system/cpu/cpu1\0",
        ] {
            assert_eq!(of(other), None, "{other:?}");
        }
        assert!(WentOffline::Unknown.contains(3) && !WentOffline::These([1].into()).contains(3));
    }
}
