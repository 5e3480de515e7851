//! `gannet-agent top`: what the processors are doing now, by process, function and stack.
//!
//! The feed sends a snapshot per window; everything else happens here: adding up, sorting, drawing, keys.

use std::{
    io::{self, IsTerminal},
    time::Duration,
};

use ratatui::{
    DefaultTerminal,
    crossterm::event::{self, Event, KeyEventKind},
};
use tokio::sync::mpsc::{self, error::TryRecvError};

use super::{
    model::{Model, Outcome},
    snapshot::Snapshot,
    view,
};

/// How long a key waits for its answer at most.
const TICK: Duration = Duration::from_millis(50);

/// Why the table cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum ScreenError {
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
pub(super) fn require_terminal() -> Result<(), ScreenError> {
    if io::stdout().is_terminal() && io::stdin().is_terminal() {
        Ok(())
    } else {
        Err(ScreenError::NotATerminal)
    }
}

/// Shows snapshots until the user leaves. It blocks, and belongs on a thread of its own.
pub(super) fn run(snapshots: mpsc::Receiver<Snapshot>) -> Result<(), ScreenError> {
    require_terminal()?;
    let mut terminal = ratatui::try_init()?;
    let result = show(&mut terminal, snapshots);
    ratatui::restore();
    result
}

/// The table as plain text: the `most` busiest processes.
pub(super) fn once(snapshot: &Snapshot, most: usize) -> String {
    let mut model = Model::default();
    model.update(snapshot);
    view::text(&model, most)
}

fn show(terminal: &mut DefaultTerminal, mut snapshots: mpsc::Receiver<Snapshot>) -> Result<(), ScreenError> {
    let mut model = Model::default();
    loop {
        loop {
            match snapshots.try_recv() {
                Ok(snapshot) => model.update(&snapshot),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => return Err(ScreenError::FeedEnded),
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
