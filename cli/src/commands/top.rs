//! `volary top`: a live view of a run on the terminal.

mod draw;

use super::operate;
use crate::limits::{TOP_INTERVAL, TOP_POINTS_MAX};
use crate::output;
use crate::rundir::Target;
use anyhow::{Context, bail};
use ratatui::crossterm::event::{self, Event, KeyCode, KeyModifiers};
use std::collections::VecDeque;
use std::io::IsTerminal;
use volary_core::Step;
use volary_protocol::operator::{OperatorReply, OperatorRequest, Status};

/// The size of the view that `--once` prints, in columns and rows.
const ONCE_SIZE: (u16, u16) = (110, 40);

/// Show a live view of a run on the terminal.
#[derive(clap::Args)]
#[command(after_help = "\
q ends the view; the run continues.

Examples:
  volary top
  volary top --dir runs/quickstart
  volary top --once                                   one view, as text")]
pub struct Args {
    #[command(flatten)]
    supervisor: operate::Args,
    /// Print one view as text and end.
    #[arg(long)]
    once: bool,
}

/// The state of the view.
#[derive(Debug, Default)]
struct View {
    status: Option<Box<Status>>,
    /// The losses of the last steps.
    losses: VecDeque<(Step, f64)>,
    /// Tokens per second of the last steps.
    speeds: VecDeque<u64>,
    /// The error of the last request.
    error: Option<String>,
}

impl View {
    fn update(&mut self, reply: anyhow::Result<OperatorReply>) {
        match reply {
            Ok(OperatorReply::Status(status)) => {
                self.error = None;
                if let (Some(loss), true) =
                    (status.loss, self.losses.back().is_none_or(|last| last.0 != status.step))
                {
                    push(&mut self.losses, (status.step, loss));
                    push(&mut self.speeds, status.tokens_per_second.unwrap_or_default() as u64);
                }
                self.status = Some(status);
            }
            Ok(OperatorReply::Failed { reason }) => self.error = Some(reason),
            Ok(_) => self.error = Some("unexpected reply of the supervisor".into()),
            Err(error) => self.error = Some(format!("{}; retrying", output::with_causes(&error))),
        }
    }
}

/// Appends a point to a curve, which keeps the last [`TOP_POINTS_MAX`].
fn push<T>(curve: &mut VecDeque<T>, point: T) {
    curve.push_back(point);
    while curve.len() > TOP_POINTS_MAX {
        curve.pop_front();
    }
}

/// Runs the command.
///
/// # Errors
/// When there is no supervisor, or no terminal.
pub fn run(args: Args) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let target = args.supervisor.target()?;
    let ask = |target: &Target| -> anyhow::Result<OperatorReply> {
        let reply = volary_protocol::operate(&target.addresses, &target.token, &OperatorRequest::Status);
        Ok(runtime.block_on(reply)?)
    };
    let mut view = View::default();
    // A supervisor that is missing at the start is an error; later it is expected back.
    view.update(Ok(ask(&target)?));
    if args.once {
        output::text(once(&view)?)?;
        return Ok(());
    }
    if !std::io::stdout().is_terminal() {
        bail!("standard output is not a terminal: use --once");
    }
    let mut terminal = ratatui::try_init().context("cannot use the terminal")?;
    let result = loop {
        if let Err(error) = terminal.draw(|frame| draw::draw(frame, &view)) {
            break Err(error.into());
        }
        match quit_within_interval() {
            Ok(false) => view.update(ask(&target)),
            Ok(true) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    ratatui::restore();
    result
}

/// Waits for [`TOP_INTERVAL`] or a key. Returns whether it was a key that ends the view.
fn quit_within_interval() -> anyhow::Result<bool> {
    if !event::poll(TOP_INTERVAL)? {
        return Ok(false);
    }
    Ok(match event::read()? {
        Event::Key(key) => {
            let interrupt = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
            interrupt || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc)
        }
        _ => false,
    })
}

/// The view as text.
fn once(view: &View) -> anyhow::Result<String> {
    let backend = ratatui::backend::TestBackend::new(ONCE_SIZE.0, ONCE_SIZE.1);
    let mut terminal = ratatui::Terminal::new(backend)?;
    terminal.draw(|frame| draw::draw(frame, view))?;
    let buffer = terminal.backend().buffer();
    let width = usize::from(buffer.area.width);
    let symbols: Vec<&str> = buffer.content().iter().map(ratatui::buffer::Cell::symbol).collect();
    let lines: Vec<String> = symbols.chunks(width).map(|line| line.concat().trim_end().to_owned()).collect();
    Ok(format!("{}\n", lines.join("\n").trim_end()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use volary_core::machine::Activity;
    use volary_core::{Epoch, Lane};
    use volary_protocol::LinkReport;
    use volary_protocol::operator::{NodeStatus, SourceStatus, SupervisorStatus};

    #[test]
    fn one_view_shows_progress_cluster_load_and_events() {
        let links = vec![LinkReport {
            peer: "node-2".into(),
            round_trip_ms: 1.5,
            sent_bytes: 2_500_000,
            received_bytes: 0,
            bandwidth: None,
        }];
        let node = NodeStatus {
            name: "node-1".into(),
            pid: 1,
            state: "member".into(),
            device: "cpu".into(),
            arithmetic: String::new(),
            capacity: 1.25,
            zone: String::new(),
            shards: 17,
            lanes: vec![Lane(0), Lane(2)],
            links,
            http: None,
        };
        let status = Status {
            run: "quickstart".into(),
            epoch: Epoch(4),
            step: Step(50),
            steps: 200,
            activity: Activity::Training,
            checkpoint: Some(Step(40)),
            failed_checkpoints: 0,
            trouble: None,
            skipped_steps: 0,
            load: vec![vec![10, 10, 10, 10], vec![40, 0, 0, 0]],
            loss: Some(3.25),
            tokens_per_second: Some(5000.0),
            sources: vec![SourceStatus { name: "code".into(), epochs: 0.5 }],
            predicted_step_ms: 0.0,
            supervisor: SupervisorStatus { pid: 2, address: "127.0.0.1:1".into() },
            nodes: vec![node],
            shards: Vec::new(),
            events: vec!["{\"unix_ms\":1,\"at_step\":7,\"event\":\"joined\",\"node\":\"node-1\"}".into()],
        };
        let mut view = View::default();
        view.update(Ok(OperatorReply::Status(Box::new(status))));
        view.update(Err(anyhow::anyhow!("gone")));
        let text = once(&view).expect("a view");
        for part in [
            "quickstart  training, epoch 4, checkpoint step 40   gone; retrying",
            "step 50 of 200",
            "loss 3.2500",
            "5000 tokens/s",
            "node-1           member",
            "1.5 ms     2.5 MB     0 2",
            "  0  ▄▄ ▄▄ ▄▄ ▄▄",
            "  1  ██",
            "step 7      joined             node=\"node-1\"",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
    }
}
