//! Raw samples that wait for the unwind tables of their files.
//!
//! A raw sample carries registers and a copy of the stack. It waits until the tables that its stack needs are made, so that
//! even the first sample of a program is complete. Samples of one image stay in order. A sample that waited too long, or
//! one sample too many, is unwound with the tables that there are.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    model::{Image, ImageKey, MappedFile, Sample},
    process::{ImageChanges, ProcessTable},
    runtimes::{CodeNeeds, Interpreter},
    tables::{self, UnwoundSample},
};

/// Samples that may wait, some 25 KiB each.
const MAX_SAMPLES: usize = 2048;
/// How long a sample waits. The tables of the largest programs take a second, on a crowded machine several; samples that
/// wait behind such a program must not come out broken for that.
const WAIT_TIMEOUT: Duration = Duration::from_secs(15);

/// How often the code of a process is read for one sample. Each reading shows more callers.
const MAX_READINGS: u32 = 64;
/// Samples whose needs are read together with those of the first one.
const MAX_TOGETHER: usize = 32;

/// Unwinds raw samples.
pub(super) trait Unwinder {
    /// Unwinds by the tables that there are. Returns the first file whose table is still to be made.
    fn unwind(&self, image: &Image, interpreter: Option<&Interpreter>, sample: &Sample) -> UnwoundSample;

    /// Has what is needed read of the process; with none of it, where its runtime keeps code. Returns whether the sample has to
    /// wait for that.
    fn read_code(
        &mut self,
        key: &ImageKey,
        image: &Image,
        interpreter: Option<&Arc<Interpreter>>,
        needs: CodeNeeds,
    ) -> bool;

    /// Asks for the table of a file that this number of samples waits for.
    fn request(&mut self, file: &Arc<MappedFile>, samples: usize);
}

/// Knows what processes have mapped.
pub(super) trait ImageSource {
    /// Returns the mappings of an image now; `None` if the process is not known any more.
    fn image(&self, key: &ImageKey) -> Option<Arc<Image>>;

    /// Returns the interpreter of an image, once its frames are taken.
    fn interpreter(&self, key: &ImageKey) -> Option<Arc<Interpreter>>;

    /// Reads the mappings of an image again, as they do not hold `address`. Returns what has changed.
    fn rescan(&mut self, key: &ImageKey, address: u64) -> ImageChanges;
}

impl ImageSource for ProcessTable {
    fn image(&self, key: &ImageKey) -> Option<Arc<Image>> {
        self.get(key).map(|process| Arc::clone(&process.image))
    }

    fn interpreter(&self, key: &ImageKey) -> Option<Arc<Interpreter>> {
        self.get(key).and_then(|process| process.interpreter.clone())
    }

    fn rescan(&mut self, key: &ImageKey, address: u64) -> ImageChanges {
        self.sampled_again(key, address);
        self.take_changes()
    }
}

/// A result of a pass over the backlog. The caller carries out the results in order.
#[derive(Debug)]
pub(super) enum Resolved {
    /// Mappings changed before the samples that follow.
    Changes(ImageChanges),
    /// A sample is unwound. If other files have since taken the place of some of its image's, it belongs to `former`.
    Sample { sample: Sample, former: Option<Arc<Image>> },
    /// No sample of this image waits any more.
    Done(ImageKey),
}

#[derive(Default)]
pub(super) struct Backlog {
    waiting: HashMap<ImageKey, VecDeque<Waiting>>,
    samples: usize,
    /// Frames so far without a name because their code may have changed since the sample.
    unproven: u64,
}

struct Waiting {
    since: Instant,
    sample: Sample,
    /// The image when the sample was taken, if files of it were replaced since.
    former: Option<Arc<Image>>,
    /// How often code was read for it.
    readings: u32,
}

impl Backlog {
    pub(super) fn push(&mut self, sample: Sample, now: Instant) {
        let samples = self.waiting.entry(ImageKey::of(&sample.subject)).or_default();
        samples.push_back(Waiting { since: now, sample, former: None, readings: 0 });
        self.samples += 1;
    }

    /// Other files take the place of some of an image's: the samples that wait were taken of the `former` ones.
    pub(super) fn replace_image(&mut self, key: &ImageKey, former: &Arc<Image>) {
        for waiting in self.waiting.get_mut(key).into_iter().flatten() {
            waiting.former.get_or_insert_with(|| Arc::clone(former));
        }
    }

    /// Unwinds the samples whose tables are made; with `force` all samples, by the tables that there are.
    pub(super) fn resolve(
        &mut self,
        unwinder: &mut impl Unwinder,
        images: &mut impl ImageSource,
        now: Instant,
        force: bool,
    ) -> Vec<Resolved> {
        let force = force || self.samples > MAX_SAMPLES;
        let mut pass = Pass { unwinder, images, now, force, resolved: Vec::new(), unproven: 0 };
        for (key, mut samples) in std::mem::take(&mut self.waiting) {
            pass.resolve(&key, &mut samples);
            if !samples.is_empty() {
                self.waiting.insert(key, samples);
            }
        }
        self.samples = self.waiting.values().map(VecDeque::len).sum();
        self.unproven += pass.unproven;
        pass.resolved
    }

    pub(super) fn is_empty(&self) -> bool {
        self.samples == 0
    }

    /// Returns how many frames so far have no name because their code may have changed since the sample.
    pub(super) fn unproven(&self) -> u64 {
        self.unproven
    }

    /// Returns how many samples of an image wait.
    pub(super) fn waiting(&self, key: &ImageKey) -> usize {
        self.waiting.get(key).map_or(0, VecDeque::len)
    }

    /// Returns the rules of all samples that wait, one bit for each slot.
    pub(super) fn rules(&self) -> u64 {
        self.samples().fold(0, |rules, sample| rules | sample.subject.rules)
    }

    /// Counts the samples that wait, each once for each of its rules that is in `rules`.
    pub(super) fn count(&self, rules: u64) -> u64 {
        self.samples().map(|sample| u64::from((sample.subject.rules & rules).count_ones())).sum()
    }

    fn samples(&self) -> impl Iterator<Item = &Sample> {
        self.waiting.values().flatten().map(|waiting| &waiting.sample)
    }
}

/// One pass over the backlog.
struct Pass<'a, U, I> {
    unwinder: &'a mut U,
    images: &'a mut I,
    now: Instant,
    force: bool,
    resolved: Vec<Resolved>,
    /// Frames without a name because their code may have changed since the sample.
    unproven: u64,
}

impl<U: Unwinder, I: ImageSource> Pass<'_, U, I> {
    /// Takes samples of one image from the front until one has to wait on.
    fn resolve(&mut self, key: &ImageKey, samples: &mut VecDeque<Waiting>) {
        let Some(mut image) = self.images.image(key) else {
            let unknown = samples.drain(..).map(|waiting| tables::leaf_only(waiting.sample));
            self.resolved.extend(unknown.map(|sample| Resolved::Sample { sample, former: None }));
            return;
        };
        let is_overdue = |first: &Waiting| self.now.duration_since(first.since) > WAIT_TIMEOUT;
        let force = self.force || samples.front().is_some_and(is_overdue);
        let interpreter = self.images.interpreter(key);
        let code = interpreter.as_deref();
        while let Some(Waiting { since, mut sample, former, readings }) = samples.pop_front() {
            let mut unwound = self.unwinder.unwind(former.as_ref().unwrap_or(&image), code, &sample);
            if let (Some(unknown), None, None) = (unwound.unknown, &unwound.missing, &former) {
                // The process has opened a library since its mappings were read. Once for a sample.
                let changes = self.images.rescan(key, unknown);
                self.resolved.push(Resolved::Changes(changes));
                if let Some(now) = self.images.image(key).filter(|now| !Arc::ptr_eq(now, &image)) {
                    image = now;
                    unwound = self.unwinder.unwind(&image, code, &sample);
                }
            }
            if let Some(file) = unwound.missing.as_ref().filter(|_| !force) {
                self.unwinder.request(file, samples.len() + 1);
                samples.push_front(Waiting { since, sample, former, readings });
                return;
            }
            if !force && readings < MAX_READINGS && (unwound.is_unattached || !unwound.needs.is_empty()) {
                // What the samples behind it need is read with it.
                let mut needs = unwound.needs.clone();
                for waiting in samples.iter().take(MAX_TOGETHER).filter(|_| !unwound.is_unattached) {
                    let image = waiting.former.as_ref().unwrap_or(&image);
                    needs.add(self.unwinder.unwind(image, code, &waiting.sample).needs);
                }
                if self.unwinder.read_code(key, &image, interpreter.as_ref(), needs) {
                    samples.push_front(Waiting { since, sample, former, readings: readings + 1 });
                    return;
                }
            }
            self.unproven += u64::from(unwound.unproven);
            unwound.complete(&mut sample);
            self.resolved.push(Resolved::Sample { sample, former });
        }
        self.resolved.push(Resolved::Done(*key));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashSet};

    use super::*;
    use crate::model::{Mapping, MappingKind, ProcessKey, RawUserStack, SampleKind, StackEnd, Subject};

    const KEY: ImageKey = image_key(1);

    const fn image_key(tgid: u32) -> ImageKey {
        ImageKey { process: ProcessKey { tgid, start_boottime_ns: 1 }, exec_id: 1 }
    }

    /// A raw sample at a program counter.
    fn sample(key: ImageKey, pc: u64) -> Sample {
        Sample {
            subject: Subject {
                key: key.process,
                exec_id: key.exec_id,
                ktime_ns: 0,
                cgroup_id: 0,
                comm: String::new(),
                rules: 0b101,
                candidates: 0,
            },
            tid: key.process.tgid,
            kind: SampleKind::OnCpu,
            value_ns: 1,
            kernel: Vec::new(),
            user: Vec::new(),
            end: StackEnd::None,
            end_code: 0,
            marks: crate::model::StackMarks::default(),
            state: 0,
            list_layout: 0,
            labels: None,
            raw: Some(Box::new(RawUserStack {
                pc,
                registers: Vec::new(),
                stack: Vec::new(),
                unread: Vec::new(),
                lists: None,
                live_until_ns: 0,
            })),
        }
    }

    fn image(file: &Arc<MappedFile>, start: u64, end: u64) -> Arc<Image> {
        let kind = MappingKind::File(Arc::clone(file));
        Arc::new(Image { mappings: vec![Mapping { start, end, offset: 0, kind }] })
    }

    /// Unwinds a sample to its program counter and the image's first address, if the table of its file is made.
    #[derive(Default)]
    struct Tables {
        made: HashSet<crate::model::FileId>,
        requested: Vec<(String, usize)>,
    }

    impl Unwinder for Tables {
        fn unwind(&self, image: &Image, _: Option<&Interpreter>, sample: &Sample) -> UnwoundSample {
            let pc = sample.raw.as_ref().unwrap().pc;
            let mapping = image.find(pc);
            let missing = mapping.and_then(|mapping| match &mapping.kind {
                MappingKind::File(file) if !self.made.contains(&file.id) => Some(Arc::clone(file)),
                _ => None,
            });
            let end =
                if mapping.is_some() && missing.is_none() { StackEnd::Complete } else { StackEnd::Broken };
            let frames = vec![pc, image.mappings[0].start];
            UnwoundSample {
                frames,
                end,
                unknown: mapping.is_none().then_some(pc),
                missing,
                guessed_from: None,
                needs: CodeNeeds::default(),
                is_unattached: false,
                unproven: 0,
            }
        }

        fn read_code(&mut self, _: &ImageKey, _: &Image, _: Option<&Arc<Interpreter>>, _: CodeNeeds) -> bool {
            false
        }

        fn request(&mut self, file: &Arc<MappedFile>, samples: usize) {
            self.requested.push((file.path.clone(), samples));
        }
    }

    /// The images that a process has now, and those that its next rescan finds.
    #[derive(Default)]
    struct Images {
        now: BTreeMap<ImageKey, Arc<Image>>,
        rescanned: BTreeMap<ImageKey, Arc<Image>>,
    }

    impl ImageSource for Images {
        fn image(&self, key: &ImageKey) -> Option<Arc<Image>> {
            self.now.get(key).map(Arc::clone)
        }

        fn interpreter(&self, _: &ImageKey) -> Option<Arc<Interpreter>> {
            None
        }

        fn rescan(&mut self, key: &ImageKey, _: u64) -> ImageChanges {
            let mut changes = ImageChanges::default();
            if let Some(image) = self.rescanned.remove(key) {
                self.now.insert(*key, image);
                changes.changed.insert(*key);
            }
            changes
        }
    }

    /// Writes down what became of a backlog.
    fn outcomes(resolved: &[Resolved]) -> Vec<String> {
        let outcome = |resolved: &Resolved| match resolved {
            Resolved::Changes(changes) => format!("{} changed", changes.changed.len()),
            Resolved::Sample { sample, former } => {
                assert!(sample.raw.is_none());
                let former = if former.is_some() { " of the former image" } else { "" };
                format!("{:x?} {:?}{former}", sample.user, sample.end)
            }
            Resolved::Done(key) => format!("process {} done", key.process.tgid),
        };
        resolved.iter().map(outcome).collect()
    }

    #[test]
    fn samples_wait_in_order_until_their_table_is_made() {
        let (mut backlog, mut tables, mut images) =
            (Backlog::default(), Tables::default(), Images::default());
        let file = Arc::new(MappedFile::unopened("/lib", 1, 1));
        images.now.insert(KEY, image(&file, 0x100, 0x200));
        let now = Instant::now();
        for pc in [0x101, 0x102, 0x103] {
            backlog.push(sample(KEY, pc), now);
        }
        assert_eq!(outcomes(&backlog.resolve(&mut tables, &mut images, now, false)), [""; 0]);
        assert_eq!(tables.requested, [("/lib".to_owned(), 3)]);
        assert_eq!((backlog.waiting(&KEY), backlog.rules(), backlog.count(0b1)), (3, 0b101, 3));
        tables.made.insert(file.id);
        backlog.push(sample(KEY, 0x104), now);
        let resolved = backlog.resolve(&mut tables, &mut images, now, false);
        let frames = |pc: u64| format!("[{pc:x}, 100] Complete");
        let mut expected: Vec<String> = (0x101..=0x104).map(frames).collect();
        expected.push("process 1 done".to_owned());
        assert_eq!(outcomes(&resolved), expected);
        assert!(backlog.is_empty() && backlog.rules() == 0);
    }

    #[test]
    fn a_sample_that_waited_too_long_takes_the_tables_there_are() {
        let (mut backlog, mut tables, mut images) =
            (Backlog::default(), Tables::default(), Images::default());
        let file = Arc::new(MappedFile::unopened("/large", 1, 1));
        images.now.insert(KEY, image(&file, 0x100, 0x200));
        let now = Instant::now();
        backlog.push(sample(KEY, 0x101), now);
        assert!(backlog.resolve(&mut tables, &mut images, now + WAIT_TIMEOUT, false).is_empty());
        let late = now + WAIT_TIMEOUT + Duration::from_millis(1);
        let resolved = backlog.resolve(&mut tables, &mut images, late, false);
        assert_eq!(outcomes(&resolved), ["[101, 100] Broken", "process 1 done"]);
        backlog.push(sample(KEY, 0x101), late);
        let forced = backlog.resolve(&mut tables, &mut images, late, true);
        assert_eq!(outcomes(&forced), outcomes(&resolved));
    }

    #[test]
    fn one_sample_too_many_empties_the_backlog() {
        let (mut backlog, mut tables, mut images) =
            (Backlog::default(), Tables::default(), Images::default());
        let file = Arc::new(MappedFile::unopened("/large", 1, 1));
        let now = Instant::now();
        for number in 0..=MAX_SAMPLES as u32 {
            let key = image_key(number % 7);
            images.now.insert(key, image(&file, 0x100, 0x200));
            backlog.push(sample(key, 0x101), now);
        }
        let resolved = backlog.resolve(&mut tables, &mut images, now, false);
        assert_eq!(resolved.len(), MAX_SAMPLES + 1 + 7);
        assert!(backlog.is_empty());
    }

    #[test]
    fn a_library_opened_since_is_read_before_its_sample_is_unwound() {
        let (mut backlog, mut tables, mut images) =
            (Backlog::default(), Tables::default(), Images::default());
        let file = Arc::new(MappedFile::unopened("/lib", 1, 1));
        tables.made.insert(file.id);
        images.now.insert(KEY, image(&file, 0x100, 0x200));
        images.rescanned.insert(KEY, image(&file, 0x80, 0x300));
        let now = Instant::now();
        for pc in [0x101, 0x201, 0x301] {
            backlog.push(sample(KEY, pc), now);
        }
        let resolved = backlog.resolve(&mut tables, &mut images, now, false);
        let expected = [
            "[101, 100] Complete",
            "1 changed",
            "[201, 80] Complete",
            // Still unknown: no reading of this process changes that.
            "0 changed",
            "[301, 80] Broken",
            "process 1 done",
        ];
        assert_eq!(outcomes(&resolved), expected);
    }

    #[test]
    fn samples_from_before_a_replaced_file_keep_the_former_image() {
        let (mut backlog, mut tables, mut images) =
            (Backlog::default(), Tables::default(), Images::default());
        let (old, new) =
            (Arc::new(MappedFile::unopened("/old", 1, 1)), Arc::new(MappedFile::unopened("/new", 1, 2)));
        tables.made.extend([old.id, new.id]);
        let now = Instant::now();
        backlog.push(sample(KEY, 0x101), now);
        // Two changes: the sample belongs to the first state.
        backlog.replace_image(&KEY, &image(&old, 0x100, 0x200));
        backlog.replace_image(&KEY, &image(&new, 0x90, 0x200));
        images.now.insert(KEY, image(&new, 0x80, 0x200));
        backlog.push(sample(KEY, 0x102), now);
        let resolved = backlog.resolve(&mut tables, &mut images, now, false);
        let expected = ["[101, 100] Complete of the former image", "[102, 80] Complete", "process 1 done"];
        assert_eq!(outcomes(&resolved), expected);
    }

    #[test]
    fn a_process_that_is_not_known_any_more_leaves_its_leaf_frames() {
        let (mut backlog, mut tables, mut images) =
            (Backlog::default(), Tables::default(), Images::default());
        backlog.push(sample(KEY, 0x101), Instant::now());
        let resolved = backlog.resolve(&mut tables, &mut images, Instant::now(), false);
        assert_eq!(outcomes(&resolved), ["[101] Broken"]);
        assert!(backlog.is_empty());
    }
}
