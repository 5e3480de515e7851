//! Threads that are off the CPU, and their stacks, as the kernel side keeps them until they come back.

use std::{
    io,
    mem::offset_of,
    os::fd::{AsFd as _, AsRawFd as _},
};

use gannet_bpf::types;
use libbpf_rs::{MapCore as _, MapFlags, MapHandle, MapType, libbpf_sys};

use super::{Event, Kernel, event};
use crate::model::Sample;

/// Threads whose raw stacks are kept at one time: those that are blocked below generated code, as idle threads of a virtual machine
/// are. With 20.3 KiB for each the map takes 5.1 MiB of the kernel's memory. Further threads have the frames above that code.
const MAX_RAW_STACKS: u32 = 256;
/// The only key of the outer map.
const OUTER_KEY: [u8; 4] = 0_u32.to_ne_bytes();

/// The map of raw stacks; the kernel side has it while this lives and is entered.
pub(super) type RawStacks = MapHandle;

impl Kernel {
    /// Enters a map for raw stacks of blocked threads into the kernel side, or removes it.
    pub(super) fn keep_raw_stacks(&mut self, on: bool) {
        let outer = &self.skeleton.maps.off_cpu_raw;
        if !on {
            if self.raw_stacks.take().is_some() {
                let _ = outer.delete(&OUTER_KEY);
            }
            return;
        }
        let options = libbpf_sys::bpf_map_create_opts {
            sz: size_of::<libbpf_sys::bpf_map_create_opts>() as libbpf_sys::size_t,
            ..Default::default()
        };
        let value_bytes = (event::OFF_CPU_RAW_WORDS * 8) as u32;
        let entered =
            MapHandle::create(MapType::Hash, Some("off_cpu_raws"), 4, value_bytes, MAX_RAW_STACKS, &options)
                .and_then(|map| {
                    let fd = map.as_fd().as_raw_fd().to_ne_bytes();
                    outer.update(&OUTER_KEY, &fd, MapFlags::ANY).map(|()| map)
                });
        match entered {
            Ok(map) => self.raw_stacks = Some(map),
            Err(error) => {
                let reason = format!("off-CPU stacks end at generated code: no map for them: {error}");
                tracing::warn!("{reason}");
                self.degraded.push(reason);
            }
        }
    }

    /// Returns a sample of each sampled thread that is blocked now; `value_ns` is how long it has been blocked.
    pub(crate) fn blocked_now(&self, now_ns: u64) -> Vec<Sample> {
        let map = &self.skeleton.maps.off_cpu;
        map.keys()
            .filter_map(|tid| {
                let entry = map.lookup(&tid, MapFlags::ANY).ok().flatten()?;
                let entry = match self.with_raw_stack(&tid, &entry) {
                    Ok(joined) => joined.unwrap_or(entry),
                    // It came back meanwhile, and has reported itself.
                    Err(_) => return None,
                };
                match Event::decode(&entry) {
                    Ok(Event::Sample(mut sample)) => {
                        self.ring.add_span(&entry, &mut sample);
                        Some(sample)
                    }
                    _ => None,
                }
            })
            .map(|sample| {
                let value_ns = now_ns.saturating_sub(sample.subject.ktime_ns);
                event::blocked_for(sample, value_ns)
            })
            .collect()
    }

    /// Returns the record of a blocked thread with its raw stack; `None` if its stack is no raw one.
    fn with_raw_stack(&self, tid: &[u8], entry: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let gone = || io::Error::from(io::ErrorKind::NotFound);
        let Some(event::RawPart { at, bytes, behind }) = event::RawPart::of(entry) else { return Ok(None) };
        let raws = self.raw_stacks.as_ref().ok_or_else(gone)?;
        let raw = raws.lookup(tid, MapFlags::ANY).map_err(io::Error::other)?.ok_or_else(gone)?;
        // The same interval still lasts, and so it was its stack.
        let again = self.skeleton.maps.off_cpu.lookup(tid, MapFlags::ANY).map_err(io::Error::other)?;
        let head = offset_of!(types::sample, value_ns);
        if again.as_deref().and_then(|again| again.get(..head)) != entry.get(..head) {
            return Err(gone());
        }
        let parts = [entry.get(..at), raw.get(..bytes), entry.get(at..at + behind)];
        let parts: Option<Vec<_>> = parts.into_iter().collect();
        Ok(Some(parts.ok_or_else(gone)?.concat()))
    }
}
