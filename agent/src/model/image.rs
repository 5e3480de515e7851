//! The executable mappings of a process, and events that change them.

use std::sync::Arc;

use super::MappedFile;

/// Up to this number of mappings, each stays by itself.
const MAX_SEPARATE: usize = 1024;

/// The executable mappings of one image of a process.
#[derive(Clone, Debug, Default)]
pub struct Image {
    /// Sorted by `start`, disjoint.
    pub mappings: Vec<Mapping>,
}

/// One executable mapping.
#[derive(Clone, Debug)]
pub struct Mapping {
    /// First address, inclusive.
    pub start: u64,
    /// End address, exclusive.
    pub end: u64,
    /// Offset of `start` in the file, in bytes; 0 if there is no file.
    pub offset: u64,
    /// The mapped object.
    pub kind: MappingKind,
}

/// A mapped object.
#[derive(Clone, Debug)]
pub enum MappingKind {
    /// A file, held open so that it can be read after the process has exited or the file was deleted.
    File(Arc<MappedFile>),
    /// The kernel's own shared object.
    Vdso,
    /// Executable memory without a file: the output of a just-in-time compiler.
    Anon,
}

impl Image {
    /// Adds a mapping. It replaces the parts of other mappings that it covers.
    pub fn map(&mut self, new: Mapping) {
        let begin = self.mappings.partition_point(|old| old.end <= new.start);
        let end = self.mappings.partition_point(|old| old.start < new.end);
        let mut left = Vec::with_capacity(3);
        // A part of the first and of the last mapping that it covers may be left.
        if let Some(first) = self.mappings[begin..end].first().filter(|first| first.start < new.start) {
            left.push(Mapping { end: new.start, ..first.clone() });
        }
        let (start, last) = (new.end, self.mappings[begin..end].last().filter(|last| last.end > new.end));
        let rest = last.map(|last| {
            let moved = if matches!(last.kind, MappingKind::File(_)) { start - last.start } else { 0 };
            Mapping { start, offset: last.offset + moved, ..last.clone() }
        });
        left.push(new);
        left.extend(rest);
        self.mappings.splice(begin..end, left);
    }

    /// Joins neighbouring mappings without files, if there are many: compilers that work at run time make thousands. Between
    /// two of them nothing executable is mapped, so the addresses between them may count as theirs.
    pub fn join_anonymous(&mut self) {
        if self.mappings.len() <= MAX_SEPARATE {
            return;
        }
        self.mappings.dedup_by(|next, first| {
            let joined = matches!((&first.kind, &next.kind), (MappingKind::Anon, MappingKind::Anon));
            if joined {
                first.end = next.end;
            }
            joined
        });
    }

    /// Reports whether one mapping without a file holds all of these addresses.
    pub fn is_anonymous(&self, start: u64, end: u64) -> bool {
        self.find(start)
            .is_some_and(|mapping| end <= mapping.end && matches!(mapping.kind, MappingKind::Anon))
    }

    /// Reports whether a mapping of a file holds any of these addresses.
    pub fn has_file_in(&self, start: u64, end: u64) -> bool {
        let first = self.mappings.partition_point(|mapping| mapping.end <= start);
        let mut inside = self.mappings[first..].iter().take_while(|mapping| mapping.start < end);
        inside.any(|mapping| matches!(mapping.kind, MappingKind::File(_)))
    }

    /// Returns the mapping that holds `address`.
    pub fn find(&self, address: u64) -> Option<&Mapping> {
        let after = self.mappings.partition_point(|mapping| mapping.start <= address);
        self.mappings[..after].last().filter(|mapping| address < mapping.end)
    }
}

/// A change of a process's mappings, reported by perf events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MappingEvent {
    /// A process has begun `execve`: later mappings belong to the next image.
    Cleared {
        /// The process, by its thread group id.
        tgid: u32,
        /// Nanoseconds of the boot clock.
        ktime_ns: u64,
    },
    /// A process has mapped something executable.
    Mapped {
        /// The process, by its thread group id.
        tgid: u32,
        /// Nanoseconds of the boot clock.
        ktime_ns: u64,
        /// The new mapping.
        mapping: NewMapping,
    },
}

impl MappingEvent {
    /// Returns the time of the event: nanoseconds of the boot clock.
    pub fn ktime_ns(&self) -> u64 {
        match self {
            Self::Cleared { ktime_ns, .. } | Self::Mapped { ktime_ns, .. } => *ktime_ns,
        }
    }
}

/// A new executable mapping, as `/proc/PID/maps` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewMapping {
    /// First address, inclusive.
    pub start: u64,
    /// End address, exclusive.
    pub end: u64,
    /// Offset in the file, in bytes.
    pub offset: u64,
    /// Device number as `stat(2)` returns it.
    pub dev: u64,
    /// Inode number; 0 if there is no file.
    pub inode: u64,
    /// Path without ` (deleted)`, or `[vdso]`; empty for memory without a file.
    pub path: String,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(start: u64, end: u64, offset: u64, inode: u64) -> Mapping {
        let kind = match inode {
            0 => MappingKind::Anon,
            _ => MappingKind::File(Arc::new(MappedFile::unopened("", 0, inode))),
        };
        Mapping { start, end, offset, kind }
    }

    /// Returns inode and file offset of an address.
    fn at(image: &Image, address: u64) -> Option<(u64, u64)> {
        let mapping = image.find(address)?;
        Some(match &mapping.kind {
            MappingKind::File(file) => (file.inode, mapping.offset + address - mapping.start),
            _ => (0, 0),
        })
    }

    #[test]
    fn thousands_of_anonymous_mappings_become_few() {
        let mut image = Image::default();
        for page in 0..20_000 {
            // A file divides them.
            let inode = u64::from(page == 5_000);
            image.map(of(page * 2, page * 2 + 1, 0, inode));
            image.join_anonymous();
        }
        assert!(image.mappings.len() <= MAX_SEPARATE + 1, "{}", image.mappings.len());
        assert!(image.mappings.windows(2).all(|two| two[0].end <= two[1].start));
        assert_eq!(at(&image, 10_000), Some((1, 0)), "the file stays");
        assert!((0..20_000).all(|page| at(&image, page * 2).is_some()), "all code stays");
        assert!(image.is_anonymous(30_000, 30_005) && !image.is_anonymous(9_999, 10_001));
        assert!(image.has_file_in(9_999, 10_001) && !image.has_file_in(10_001, 12_000));
    }

    proptest! {
        /// Checks that a newer mapping replaces older ones at its addresses (R15).
        #[test]
        fn the_last_mapping_of_an_address_counts(
            maps in prop::collection::vec((0_u64..60, 1_u64..20, 0_u64..4), 0..20)
        ) {
            let mut image = Image::default();
            let mut oracle = [None; 80];
            for (number, (start, length, inode)) in (1..).zip(maps) {
                let inode = if inode == 0 { 0 } else { number };
                image.map(of(start, start + length, if inode == 0 { 0 } else { 1000 }, inode));
                for address in start..start + length {
                    let there = if inode == 0 { (0, 0) } else { (inode, 1000 + address - start) };
                    oracle[address as usize] = Some(there);
                }
            }
            for (address, there) in oracle.into_iter().enumerate() {
                prop_assert_eq!(at(&image, address as u64), there);
            }
            prop_assert!(image.mappings.windows(2).all(|two| two[0].end <= two[1].start));
        }
    }
}
