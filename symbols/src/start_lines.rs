//! Lines at which functions begin, from DWARF (`DW_AT_decl_line`), which the reader of names leaves out.
//!
//! A file without such lines, one that is damaged, and one whose tables are too large have none; their names are as good.

use std::{borrow::Cow, time::Duration};

use gannet_elf::{Data, Elf, ElfLimits};
use gimli::{
    AttributeValue, DebugInfoOffset, DebuggingInformationEntry, Dwarf, EndianSlice, RangeIter, RunTimeEndian,
    SectionId, Unit, UnitOffset,
    constants::{
        DW_AT_abstract_origin, DW_AT_decl_line, DW_AT_high_pc, DW_AT_low_pc, DW_AT_specification,
        DW_TAG_inlined_subroutine, DW_TAG_subprogram,
    },
};
use rustix::time::{ClockId, clock_gettime};

/// Sections with the ranges of functions, and their lines. gimli also reads the head of each line program.
const SECTIONS: [&[u8]; 6] =
    [b".debug_info", b".debug_abbrev", b".debug_addr", b".debug_line", b".debug_ranges", b".debug_rnglists"];
/// Processor time of one call. A file may make each of its entries, ranges and units dear.
const MAX_CPU: Duration = Duration::from_secs(2);
/// Steps between two readings of that time.
const STEPS: u32 = 64;
/// An inlined function leads to its abstract form, and that to a declaration in a class.
const MAX_LINKS: usize = 4;
/// Nested functions of one address.
const MAX_NESTING: usize = 1024;

type Reader<'d> = EndianSlice<'d, RunTimeEndian>;

/// The contents of sections, in the order of [`SECTIONS`].
struct Contents<'d>([Cow<'d, [u8]>; SECTIONS.len()]);

impl<'d> Contents<'d> {
    /// Reads the sections if they have at most `max_bytes` together, unpacked.
    fn read(elf: &Elf<'d>, max_bytes: u64) -> Option<Self> {
        let mut left = max_bytes;
        let mut all = Self(std::array::from_fn(|_| Cow::default()));
        for (name, content) in SECTIONS.iter().zip(&mut all.0) {
            let Some(section) = elf.stored_section(name) else { continue };
            *content = elf.section_data_within(section, left).ok()?;
            left = left.checked_sub(content.len() as u64)?;
        }
        Some(all)
    }

    fn of(&self, id: SectionId) -> &[u8] {
        let index = SECTIONS.iter().position(|name| *name == id.name().as_bytes());
        index.map_or(&[], |index| &self.0[index])
    }
}

/// Returns for each ELF virtual address the first lines of the functions there, the outermost function first; 0 for an unknown one.
/// An address that the file does not describe has none. Takes at most `max_bytes` for the sections.
pub(crate) fn start_lines<'d>(
    file: impl Into<Data<'d>>,
    addresses: &[u64],
    max_bytes: u64,
) -> Option<Vec<Vec<u32>>> {
    let elf = Elf::parse(file, &ElfLimits::default()).ok()?;
    let contents = Contents::read(&elf, max_bytes)?;
    let endian = RunTimeEndian::Little;
    let load = |id: SectionId| Ok::<_, gimli::Error>(EndianSlice::new(contents.of(id), endian));
    let mut search = Search::new(Dwarf::load(load).ok()?, addresses);
    search.run();
    Some(addresses.iter().map(|address| search.lines_at(*address)).collect())
}

/// A search for the functions at some addresses.
struct Search<'d> {
    dwarf: Dwarf<Reader<'d>>,
    /// Addresses in ascending order, each once, with the lines of their functions.
    wanted: Vec<(u64, Vec<u32>)>,
    steps: u32,
    /// Processor time of the thread at which the search ends.
    end: Duration,
    is_over: bool,
}

/// Returns the processor time that this thread has used.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

impl<'d> Search<'d> {
    fn new(dwarf: Dwarf<Reader<'d>>, addresses: &[u64]) -> Self {
        let mut sorted = addresses.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        Self {
            dwarf,
            wanted: sorted.into_iter().map(|address| (address, Vec::new())).collect(),
            steps: 0,
            end: cpu_time().saturating_add(MAX_CPU),
            is_over: false,
        }
    }

    /// Counts a step. Returns whether the time for it is over.
    fn is_over(&mut self) -> bool {
        self.steps = self.steps.wrapping_add(1);
        self.is_over |= self.steps.is_multiple_of(STEPS) && cpu_time() >= self.end;
        self.is_over
    }

    fn lines_at(&self, address: u64) -> Vec<u32> {
        let found = self.wanted.binary_search_by_key(&address, |(address, _)| *address);
        found.map(|index| self.wanted[index].1.clone()).unwrap_or_default()
    }

    /// Returns the part of `wanted` in a range. Linkers write 0 or 1 as the start of functions that they left out.
    fn within(&self, range: gimli::Range) -> std::ops::Range<usize> {
        if range.begin <= 1 {
            return 0..0;
        }
        let at = |address: u64| self.wanted.partition_point(|(wanted, _)| *wanted < address);
        let first = at(range.begin);
        first..at(range.end).max(first)
    }

    /// Reads the units with wanted addresses. A unit with a fault leaves the others as they are.
    fn run(&mut self) {
        let mut headers = self.dwarf.units();
        while let Ok(Some(header)) = headers.next() {
            let Ok(unit) = self.dwarf.unit(header) else { continue };
            let mut entries = unit.entries();
            let Ok(Some(root)) = entries.next_dfs() else { continue };
            let Ok(mut ranges) = self.ranges_of(&unit, root) else { continue };
            let mut is_wanted = false;
            while !is_wanted
                && !self.is_over()
                && let Ok(Some(range)) = ranges.next()
            {
                is_wanted = !self.within(range).is_empty();
            }
            if is_wanted {
                let _ = self.read_unit(&unit);
            }
            if self.is_over() {
                return;
            }
        }
    }

    /// Returns the ranges of an entry: none if they leave the address space, because gimli adds a size to an address without a check.
    fn ranges_of(
        &self,
        unit: &Unit<Reader<'d>>,
        entry: &DebuggingInformationEntry<Reader<'d>>,
    ) -> gimli::Result<RangeIter<Reader<'d>>> {
        let (mut begin, mut size) = (0, 0);
        // A damaged entry may have an attribute twice.
        for attribute in entry.attrs() {
            let value = attribute.value();
            if attribute.name() == DW_AT_low_pc {
                begin = begin.max(self.dwarf.attr_address(unit, value)?.unwrap_or(0));
            } else if attribute.name() == DW_AT_high_pc
                && let AttributeValue::Udata(bytes) = value
            {
                size = size.max(bytes);
            }
        }
        if u64::checked_add(begin, size).is_none() {
            return Ok(RangeIter::default());
        }
        self.dwarf.die_ranges(unit, entry)
    }

    fn read_unit(&mut self, unit: &Unit<Reader<'d>>) -> gimli::Result<()> {
        let mut entries = unit.entries();
        while let Some(entry) = entries.next_dfs()? {
            if self.is_over() {
                break;
            }
            let is_inlined = entry.tag() == DW_TAG_inlined_subroutine;
            if !is_inlined && entry.tag() != DW_TAG_subprogram {
                continue;
            }
            let mut line = None;
            let mut ranges = self.ranges_of(unit, entry)?;
            while !self.is_over()
                && let Some(range) = ranges.next()?
            {
                for index in self.within(range) {
                    let line = *line.get_or_insert_with(|| self.first_line(unit, entry));
                    let lines = &mut self.wanted[index].1;
                    if !is_inlined {
                        lines.clear();
                    }
                    if lines.len() < MAX_NESTING {
                        lines.push(line);
                    }
                }
            }
        }
        Ok(())
    }

    /// Returns the line of a function, or of the entry to which it refers; 0 if it has none.
    fn first_line(&self, unit: &Unit<Reader<'d>>, entry: &DebuggingInformationEntry<Reader<'d>>) -> u32 {
        let own = |entry: &DebuggingInformationEntry<Reader<'d>>| {
            entry.attr_value(DW_AT_decl_line).and_then(|value| value.udata_value())
        };
        let link = |entry: &DebuggingInformationEntry<Reader<'d>>| {
            entry.attr_value(DW_AT_abstract_origin).or_else(|| entry.attr_value(DW_AT_specification))
        };
        let (mut line, mut next) = (own(entry), link(entry));
        let mut other: Option<Unit<Reader<'d>>> = None;
        for _ in 0..MAX_LINKS {
            if line.is_some() {
                break;
            }
            let offset: UnitOffset = match next {
                Some(AttributeValue::UnitRef(offset)) => offset,
                Some(AttributeValue::DebugInfoRef(offset)) => {
                    let Some((found, offset)) = self.unit_at(offset) else { break };
                    other = Some(found);
                    offset
                }
                _ => break,
            };
            let Ok(linked) = other.as_ref().unwrap_or(unit).entry(offset) else { break };
            (line, next) = (own(&linked), link(&linked));
        }
        line.and_then(|line| u32::try_from(line).ok()).unwrap_or(0)
    }

    /// Returns the unit with an entry, and the offset in it.
    fn unit_at(&self, offset: DebugInfoOffset) -> Option<(Unit<Reader<'d>>, UnitOffset)> {
        let mut headers = self.dwarf.units();
        while let Ok(Some(header)) = headers.next() {
            if let Some(within) = offset.to_unit_offset(&header) {
                return Some((self.dwarf.unit(header).ok()?, within));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs::File, process::Command};

    use rstest::rstest;

    use super::*;

    const MAX_BYTES: u64 = 64 << 20;

    const C: &str = "\
static inline __attribute__((always_inline)) int
inner(volatile int *x) {
	return *x + 1;
}
__attribute__((noinline)) int
outer(volatile int *x) {
	*x = 5;
	return inner(x) * *x;
}
int main(int argc, char **argv) { return outer(&argc); }
";
    const CPP: &str = "\
struct Shop {
	int sum = 0;
	int outer(volatile int *x);
	__attribute__((always_inline)) int inner(volatile int *x) { return *x + 1; }
};

__attribute__((noinline)) int Shop::outer(volatile int *x) {
	*x = 5;
	return inner(x) * *x;
}
int main(int argc, char **argv) { return Shop().outer(&argc); }
";
    const RUST: &str = "\
#[inline(always)]
fn inner(x: *mut u32) -> u32 {
    unsafe { x.read_volatile().wrapping_add(1) }
}

#[inline(never)]
#[unsafe(no_mangle)]
pub extern \"C\" fn outer(x: *mut u32) -> u32 {
    unsafe { x.write_volatile(5) };
    inner(x)
}

fn main() {
    outer(&mut 1);
}
";

    /// Checks the lines at each byte of a function, into which another one is inlined: of units that refer to each other too.
    #[rstest]
    #[case::c5(C, "c", "outer", &["gcc", "-O2", "-gdwarf-5"], [6, 2])]
    #[case::c4(C, "c", "outer", &["gcc", "-O2", "-gdwarf-4"], [6, 2])]
    #[case::compressed(C, "c", "outer", &["gcc", "-O2", "-g", "-gz=zlib"], [6, 2])]
    #[case::other_unit(C, "c", "outer", &["gcc", "-O2", "-g", "-flto"], [6, 2])]
    #[case::cpp(CPP, "cpp", "_ZN4Shop5outerEPVi", &["g++", "-O2", "-g"], [7, 4])]
    #[case::rust(RUST, "rs", "outer", &["rustc", "-O", "-g"], [8, 2])]
    fn functions_of_compilers_have_their_first_lines(
        #[case] source: &str,
        #[case] ending: &str,
        #[case] symbol: &str,
        #[case] compiler: &[&str],
        #[case] of_functions: [u32; 2],
    ) {
        let [outer, inner] = of_functions;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(format!("source.{ending}"));
        std::fs::write(&path, source).unwrap();
        let mut command = Command::new(compiler[0]);
        let command = command.args(&compiler[1..]).arg(&path).args(["-o", "program"]).current_dir(&dir);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let file = File::open(dir.path().join("program")).unwrap();
        let elf = Elf::parse(&file, &ElfLimits::default()).unwrap();
        let symbols = elf.symbols(b".symtab").unwrap();
        let begin = *symbols.functions_named(&[symbol]).first().unwrap();
        let end =
            symbols.iter().map(Result::unwrap).find(|one| one.address == begin && one.size > 0).unwrap().size;
        let addresses: Vec<u64> = (begin..begin + end).collect();
        let lines = start_lines(&file, &addresses, MAX_BYTES).unwrap();
        let found: BTreeSet<Vec<u32>> = lines.into_iter().collect();
        if ending == "rs" {
            // Functions of the library are inlined too.
            assert!(found.iter().all(|lines| lines.first() == Some(&outer)), "{found:?}");
            assert!(found.iter().any(|lines| lines.starts_with(&[outer, inner])), "{found:?}");
        } else {
            assert_eq!(found, BTreeSet::from([vec![outer], vec![outer, inner]]));
        }
        // Too little room, or no such address.
        assert!(start_lines(&file, &addresses, 100).is_none());
        assert_eq!(start_lines(&file, &[1], MAX_BYTES).unwrap(), [Vec::<u32>::new()]);
    }
}
