//! The functions of a process that its interpreter runs.

use std::{
    collections::HashMap,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering},
    },
};

use parking_lot::Mutex;

use super::{
    FunctionText, GeneratedCode, RuntimeFile, WhyNot,
    cuts::{CutLimit, Cuts},
    guard::Guard,
    texts::{self, SharedText},
};
use crate::model::{FunctionCopy, StackWord};

/// Functions of one process that get a name. Programs that make functions without end get no names beyond.
pub(super) const MAX_FUNCTIONS: usize = 16_384;
/// The number of those beyond.
pub(super) const NO_FUNCTION: u32 = u32::MAX;
/// Bytes of the texts of one process, those among them that it shares with others.
const MAX_PROCESS_BYTES: usize = 4 << 20;

/// Readings of one function that may come too late.
const MAX_MISSES: u8 = 64;

/// The interpreter of one image of a process, and its functions.
#[derive(Debug)]
pub struct Interpreter {
    /// The interpreter's file.
    pub(crate) file: Arc<RuntimeFile>,
    /// Address in the process minus address in that file.
    pub(crate) bias: u64,
    /// The code that it makes, if its frames are in there.
    pub(crate) code: Option<GeneratedCode>,
    functions: Mutex<Functions>,
    /// Bytes of the texts.
    bytes: AtomicUsize,
    /// The runtime's reads from this process.
    pub(crate) guard: Arc<Guard>,
    /// Counts of functions and code that are left out or forgotten.
    pub(crate) cuts: Arc<Cuts>,
}

#[derive(Debug, Default)]
struct Functions {
    all: Vec<Arc<ListFunction>>,
    /// By object and sum.
    numbers: HashMap<(u64, u32), u32>,
}

/// A function. It is entered when a sample has it, and gets its texts soon after.
#[derive(Debug)]
pub(crate) struct ListFunction {
    /// Address of its object.
    pub(crate) object: u64,
    /// Sum over the object.
    pub(crate) sum: u32,
    /// Its texts, or why there are none; unset while it was not read yet.
    pub(crate) text: OnceLock<Result<Arc<SharedText>, WhyNot>>,
    /// The texts but the table of lines, from copies of its memory.
    without_lines: OnceLock<Arc<SharedText>>,
    /// The thread that reads processes has been asked for its texts.
    is_requested: AtomicBool,
    /// Number of readings that found something else, or nothing.
    misses: AtomicU8,
}

impl ListFunction {
    fn new(object: u64, sum: u32) -> Self {
        Self {
            object,
            sum,
            text: OnceLock::new(),
            without_lines: OnceLock::new(),
            is_requested: AtomicBool::new(false),
            misses: AtomicU8::new(0),
        }
    }

    /// Lets the next sample of the function ask for its texts again, unless that was in vain too often. A closure lives for one call.
    /// The next call may make an equal one in the same place, which can be read.
    fn ask_again(&self) -> bool {
        let is_over = self.misses.fetch_add(1, Ordering::Relaxed) >= MAX_MISSES;
        if !is_over {
            self.is_requested.store(false, Ordering::Relaxed);
        }
        !is_over
    }

    /// Returns its texts, if they could be read.
    pub(crate) fn texts(&self) -> Option<&FunctionText> {
        let whole = self.text.get().and_then(|text| text.as_ref().ok());
        whole.or_else(|| self.without_lines.get()).map(|text| &***text)
    }
}

impl Interpreter {
    pub(crate) fn new(file: Arc<RuntimeFile>, bias: u64) -> Self {
        let (functions, bytes) = (Mutex::default(), AtomicUsize::new(0));
        Self { file, bias, code: None, functions, bytes, guard: Arc::default(), cuts: Arc::default() }
    }

    /// Adds the code that the process makes.
    pub(crate) fn with_code(mut self, code: GeneratedCode) -> Self {
        self.cuts = code.cuts();
        self.code = Some(code);
        self
    }

    /// Adds a function whose texts are known, and returns its number.
    pub(crate) fn add(&self, object: u64, text: Result<FunctionText, WhyNot>) -> u64 {
        let mut functions = self.functions.lock();
        if functions.all.len() >= MAX_FUNCTIONS {
            self.cuts.count(CutLimit::Functions, 1);
            return NO_FUNCTION.into();
        }
        let function = Arc::new(ListFunction::new(object, 0));
        let number = functions.all.len() as u64;
        functions.all.push(Arc::clone(&function));
        drop(functions);
        self.set_text(&function, text);
        number
    }

    /// Reads the texts of a function from copies of its memory.
    pub(crate) fn read_copy(&self, copy: &FunctionCopy) {
        let number = self.functions.lock().number(copy.object, copy.sum);
        let Some(function) = self.function(number.into()).filter(|function| function.text.get().is_none())
        else {
            return;
        };
        let read = self
            .guard
            .call(|| self.file.runtime.read_function(&self.file, self.bias, copy.object, copy.sum, copy));
        match read {
            // Its page was not in memory. The process may still live.
            Ok(text) if text.lines.is_empty() => {
                // A second copy is the same.
                if function.without_lines.get().is_none()
                    && let Ok(text) = self.keep(text)
                {
                    let _ = function.without_lines.set(text);
                }
            }
            Ok(text) => self.set_text(&function, Ok(text)),
            Err(_) => {}
        }
    }

    /// Replaces the object of each list frame by the number of its function, which holds as long as the process. Returns the
    /// functions that have no texts and were not returned before: the caller reads their texts.
    pub(crate) fn enter(&self, stack: &mut [u64]) -> Vec<Arc<ListFunction>> {
        let mut new = Vec::new();
        let mut functions = self.functions.lock();
        for at in 0..stack.len() {
            let StackWord::Function(object) = StackWord::decode(stack[at]) else { continue };
            let sum = match stack.get(at + 1).map(|word| StackWord::decode(*word)) {
                Some(StackWord::Position { sum, .. }) => sum,
                _ => 0,
            };
            let number = functions.number(object, sum);
            if number == NO_FUNCTION {
                self.cuts.count(CutLimit::Functions, 1);
            }
            stack[at] = StackWord::Function(number.into()).encode();
            let function =
                functions.all.get(number as usize).filter(|function| function.text.get().is_none());
            new.extend(
                function.filter(|function| !function.is_requested.swap(true, Ordering::Relaxed)).cloned(),
            );
        }
        new
    }

    /// Returns a function by its number.
    pub(crate) fn function(&self, number: u64) -> Option<Arc<ListFunction>> {
        self.functions.lock().all.get(usize::try_from(number).ok()?).map(Arc::clone)
    }

    /// Sets the texts of a function, unless they are set or the texts take too much memory. A reading that came too late may be
    /// repeated.
    pub(crate) fn set_text(&self, function: &ListFunction, text: Result<FunctionText, WhyNot>) {
        let is_late = matches!(text, Err(WhyNot::Unreadable | WhyNot::Unanswered | WhyNot::Implausible(_)));
        if is_late && function.ask_again() {
            return;
        }
        if function.text.get().is_none()
            && let Err(Ok(unused)) = function.text.set(text.and_then(|text| self.keep(text)))
        {
            self.bytes.fetch_sub(unused.bytes(), Ordering::Relaxed);
        }
    }

    /// Returns the copy of a text that all processes share.
    fn keep(&self, text: FunctionText) -> Result<Arc<SharedText>, WhyNot> {
        let size = text.bytes();
        let has_room = self.bytes.fetch_add(size, Ordering::Relaxed) + size <= MAX_PROCESS_BYTES;
        let shared = if has_room { texts::share(text) } else { None };
        shared.ok_or_else(|| {
            self.bytes.fetch_sub(size, Ordering::Relaxed);
            self.cuts.count(CutLimit::Texts, 1);
            WhyNot::TooLarge
        })
    }

    /// Returns the line of a position in a function; 0 if it is not known.
    pub(crate) fn line(&self, text: &FunctionText, position: u32) -> u32 {
        self.file.runtime.line(&self.file, text, position)
    }
}

impl Functions {
    /// Returns the number of a function; the number of no function if there are too many.
    fn number(&mut self, object: u64, sum: u32) -> u32 {
        if let Some(number) = self.numbers.get(&(object, sum)) {
            return *number;
        }
        if self.all.len() >= MAX_FUNCTIONS {
            return NO_FUNCTION;
        }
        let number = self.all.len() as u32;
        self.all.push(Arc::new(ListFunction::new(object, sum)));
        self.numbers.insert((object, sum), number);
        number
    }
}

#[cfg(test)]
impl Interpreter {
    /// Returns a process of CPython 3.11.2 without functions.
    pub(crate) fn of_python() -> Self {
        let detected = super::Detected {
            version: (3, 11),
            version_text: "3.11.2".into(),
            addresses: Vec::new(),
            layout: 11,
        };
        Self::new(Arc::new(RuntimeFile { runtime: &super::python::Python, detected }), 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn enter(interpreter: &Interpreter, object: u64) -> Arc<ListFunction> {
        let words = [StackWord::Function(object), StackWord::Position { sum: 1, position: 2 }];
        interpreter.enter(&mut words.map(StackWord::encode)).remove(0)
    }

    #[test]
    fn the_texts_of_a_process_have_a_limit() {
        let interpreter = Interpreter::of_python();
        let (mut kept, mut refused) = (0, 0);
        let text = FunctionText { lines: vec![0; 16 << 10], ..FunctionText::default() };
        let size = text.bytes();
        // The same text, because it counts for each process however often the process has it.
        for object in 0..500 {
            let function = enter(&interpreter, object);
            let text = text.clone();
            interpreter.set_text(&function, Ok(text));
            match function.text.get() {
                Some(Ok(_)) => kept += 1,
                other => {
                    assert_eq!(other, Some(&Err(WhyNot::TooLarge)));
                    refused += 1;
                }
            }
        }
        assert_eq!((kept, refused), (MAX_PROCESS_BYTES / size, 500 - kept));
        assert_eq!(interpreter.cuts.of(CutLimit::Texts), refused as u64);
        let held = interpreter.bytes.load(Ordering::Relaxed);
        assert!(held <= MAX_PROCESS_BYTES);
        // A second answer changes nothing.
        interpreter.set_text(&enter(&interpreter, 900), Err(WhyNot::Unreadable));
        assert_eq!(interpreter.bytes.load(Ordering::Relaxed), held);
    }

    #[test]
    fn a_function_that_was_read_too_late_is_read_again() {
        let interpreter = Interpreter::of_python();
        let function = enter(&interpreter, 7);
        let enters = || {
            let words = [StackWord::Function(7), StackWord::Position { sum: 1, position: 2 }];
            interpreter.enter(&mut words.map(StackWord::encode)).len()
        };
        assert_eq!(enters(), 0, "the reading is under way");
        interpreter.set_text(&function, Err(WhyNot::Implausible("another function than the samples had")));
        assert_eq!(enters(), 1);
        interpreter.set_text(&function, Err(WhyNot::Unreadable));
        assert_eq!(enters(), 1);
        interpreter.set_text(&function, Ok(FunctionText { name: "f".into(), ..FunctionText::default() }));
        assert_eq!((enters(), function.texts().unwrap().name.as_str()), (0, "f"));
        // What never can be read is not read for ever, and a version that is not supported is not read again.
        let hopeless = enter(&interpreter, 8);
        for _ in 0..=MAX_MISSES {
            interpreter.set_text(&hopeless, Err(WhyNot::Unreadable));
        }
        assert_eq!(hopeless.text.get(), Some(&Err(WhyNot::Unreadable)));
        let foreign = enter(&interpreter, 9);
        interpreter.set_text(&foreign, Err(WhyNot::Version));
        assert_eq!(foreign.text.get(), Some(&Err(WhyNot::Version)));
    }

    #[test]
    fn frames_of_functions_beyond_the_limit_are_counted() {
        let interpreter = Interpreter::of_python();
        (0..MAX_FUNCTIONS as u64).for_each(|object| drop(enter(&interpreter, object)));
        assert_eq!(interpreter.cuts.of(CutLimit::Functions), 0);
        let position = StackWord::Position { sum: 1, position: 2 };
        let frames = [1 << 30, 0, 1 << 30].map(|object| [StackWord::Function(object), position]);
        let mut stack = frames.as_flattened().iter().map(|word| word.encode()).collect::<Vec<_>>();
        interpreter.enter(&mut stack);
        assert_eq!(interpreter.cuts.of(CutLimit::Functions), 2);
        let has_name = |at: usize| match StackWord::decode(stack[at]) {
            StackWord::Function(number) => interpreter.function(number).is_some(),
            other => unreachable!("{other:?}"),
        };
        assert_eq!([0, 2, 4].map(has_name), [false, true, false]);
    }

    #[test]
    fn a_function_is_entered_once() {
        let interpreter = Interpreter::of_python();
        let function = enter(&interpreter, 7);
        let mut stack = [
            StackWord::Address(0x1234),
            StackWord::Function(7),
            StackWord::Position { sum: 1, position: 9 },
            StackWord::Function(7),
            StackWord::Position { sum: 2, position: 9 },
        ]
        .map(StackWord::encode);
        let new = interpreter.enter(&mut stack);
        assert_eq!((new.len(), new[0].object, new[0].sum), (1, 7, 2), "another object at the same address");
        let numbers = [1, 3].map(|at| StackWord::decode(stack[at]));
        assert_eq!(numbers, [StackWord::Function(0), StackWord::Function(1)]);
        assert!(Arc::ptr_eq(&interpreter.function(0).unwrap(), &function));
        assert!(interpreter.function(2).is_none() && interpreter.function(NO_FUNCTION.into()).is_none());
    }
}
