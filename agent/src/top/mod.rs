//! `gannet-agent top`: what the processors are doing now, by process, function and stack.
//!
//! The feed sends a snapshot per window; everything else happens here: adding up, sorting, drawing, keys.

mod model;
mod view;

use std::{
    io::{self, IsTerminal},
    time::Duration,
};

use gannet_proto::{ledger::Ledger, profiles::Profile};
use ratatui::{
    DefaultTerminal,
    crossterm::event::{self, Event, KeyEventKind},
};
use tokio::sync::mpsc::{self, error::TryRecvError};

pub use model::{Model, Outcome, SortBy};

use crate::process::ProcessKey;

/// How long a key waits for its answer at most.
const TICK: Duration = Duration::from_millis(50);

/// What the feed knows of a process beside its samples.
#[derive(Clone, Debug)]
pub struct ProcessInfo {
    /// Who.
    pub key: ProcessKey,
    /// Command name of the thread group leader.
    pub comm: String,
    /// The systemd unit, container, or path of the executable: where it belongs.
    pub place: String,
    /// The rule that samples it.
    pub rule: String,
    /// `armed`, `exited`, ...
    pub state: String,
}

/// One window of everything.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// How long the window was.
    pub duration: Duration,
    /// Its samples, with names; each sample has the label `pid`, and its last value is nanoseconds.
    pub profiles: Vec<Profile>,
    /// Every process that is watched, sampled or not.
    pub processes: Vec<ProcessInfo>,
    /// Since the start.
    pub ledger: Ledger,
}

/// Why the table cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum TopError {
    /// Output goes to a file or a pipe.
    #[error(
        "`top` needs a terminal; use `top --once` to print the table once, or `record` to write a profile"
    )]
    NotATerminal,
    /// The terminal does not do as it is told.
    #[error("the terminal cannot be used: {0}")]
    Terminal(#[from] io::Error),
    /// The feed has ended by itself.
    #[error("sampling has ended")]
    FeedEnded,
}

/// Whether there is a terminal to draw on; to be asked before sampling is set up.
pub fn require_terminal() -> Result<(), TopError> {
    if io::stdout().is_terminal() && io::stdin().is_terminal() { Ok(()) } else { Err(TopError::NotATerminal) }
}

/// Shows snapshots until the user leaves. It blocks, and belongs on a thread of its own.
pub fn run(snapshots: mpsc::Receiver<Snapshot>) -> Result<(), TopError> {
    require_terminal()?;
    let mut terminal = ratatui::try_init()?;
    let result = show(&mut terminal, snapshots);
    ratatui::restore();
    result
}

/// The table as plain text: the `most` busiest processes.
pub fn once(snapshot: &Snapshot, most: usize) -> String {
    let mut model = Model::default();
    model.update(snapshot);
    view::text(&model, most)
}

fn show(terminal: &mut DefaultTerminal, mut snapshots: mpsc::Receiver<Snapshot>) -> Result<(), TopError> {
    let mut model = Model::default();
    loop {
        loop {
            match snapshots.try_recv() {
                Ok(snapshot) => model.update(&snapshot),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return Err(TopError::FeedEnded),
            }
        }
        terminal.draw(|frame| view::draw(frame, &mut model))?;
        while event::poll(TICK)? {
            if let Event::Key(key) = event::read()?
                && key.kind != KeyEventKind::Release
                && model.key(key) == Outcome::Leave
            {
                return Ok(());
            }
            terminal.draw(|frame| view::draw(frame, &mut model))?;
        }
    }
}
