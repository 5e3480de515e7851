//! The screen of `top`: receives one snapshot for each window, and sums, sorts, draws and handles keys.

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

/// Longest time until the screen handles a key.
const KEY_INTERVAL: Duration = Duration::from_millis(50);

/// Reasons why the screen cannot work.
#[derive(Debug, thiserror::Error)]
pub enum ScreenError {
    /// Standard input or output is no terminal.
    #[error(
        "`top` needs a terminal; use `top --once` to print the table once, or `record` to write a profile"
    )]
    NotATerminal,
    /// A terminal operation failed.
    #[error("cannot use the terminal: {0}")]
    Terminal(#[from] io::Error),
    /// The feed has ended.
    #[error("sampling has ended")]
    FeedEnded,
}

/// Checks that there is a terminal to draw on. The caller does this before it starts to sample.
pub(super) fn require_terminal() -> Result<(), ScreenError> {
    if io::stdout().is_terminal() && io::stdin().is_terminal() {
        Ok(())
    } else {
        Err(ScreenError::NotATerminal)
    }
}

/// Shows snapshots until the user leaves. Blocks, so it needs its own thread.
pub(super) fn run(snapshots: mpsc::Receiver<Snapshot>) -> Result<(), ScreenError> {
    require_terminal()?;
    let mut terminal = ratatui::try_init()?;
    let result = show(&mut terminal, snapshots);
    ratatui::restore();
    result
}

/// Returns the table of the `limit` busiest processes as plain text.
pub(super) fn once(snapshot: &Snapshot, limit: usize) -> String {
    let mut model = Model::default();
    model.update(snapshot);
    view::text(&model, limit)
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
        while event::poll(KEY_INTERVAL)? {
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
