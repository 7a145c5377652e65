//! `volary top`: a run on the terminal, live.

use super::operate::Args as Which;
use crate::rundir::{self, Role, Target};
use anyhow::{Context, bail};
use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Gauge, List, Paragraph, Row, Sparkline, Table};
use std::collections::VecDeque;
use std::io::IsTerminal;
use std::time::Duration;
use volary_protocol::operator::{OperatorReply, OperatorRequest, Status};

/// How often the supervisor is asked.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// Figures that the curves remember.
const REMEMBERED: usize = 600;
/// The terminal that `--once` draws on when there is none.
const PLAIN_SIZE: (u16, u16) = (110, 40);

/// Show a run on the terminal, live.
#[derive(clap::Args)]
#[command(after_help = "\
q ends it; the run goes on.

Examples:
  volary top
  volary top --dir runs/quickstart
  volary top --once                                   one look, as text")]
pub struct Args {
    #[command(flatten)]
    which: Which,
    /// Print one look as text and end.
    #[arg(long)]
    once: bool,
}

/// What has been seen of a run.
#[derive(Debug, Default)]
struct Seen {
    status: Option<Box<Status>>,
    losses: VecDeque<(u64, f64)>,
    speeds: VecDeque<u64>,
    trouble: Option<String>,
}

impl Seen {
    fn take(&mut self, answer: anyhow::Result<OperatorReply>) {
        match answer {
            Ok(OperatorReply::Status(status)) => {
                self.trouble = None;
                if let (Some(loss), true) =
                    (status.loss, self.losses.back().is_none_or(|last| last.0 != status.step.0))
                {
                    remember(&mut self.losses, (status.step.0, loss));
                    remember(&mut self.speeds, status.tokens_per_second.unwrap_or_default() as u64);
                }
                self.status = Some(status);
            }
            Ok(OperatorReply::Failed { reason }) => self.trouble = Some(reason),
            Ok(_) => self.trouble = Some("the supervisor answered another question".into()),
            Err(error) => self.trouble = Some(format!("{error:#}; trying again")),
        }
    }
}

fn remember<T>(values: &mut VecDeque<T>, value: T) {
    values.push_back(value);
    while values.len() > REMEMBERED {
        values.pop_front();
    }
}

/// Runs the command.
///
/// # Errors
/// When there is no supervisor, or no terminal.
pub fn run(args: Args) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let token = rundir::read_token(args.which.token_file.as_deref())?;
    let which = &args.which;
    let target =
        rundir::target(which.dir.as_deref(), which.supervisor.as_deref(), token.as_deref(), Role::Operator)?;
    let ask = |target: &Target| -> anyhow::Result<OperatorReply> {
        let asked = volary_protocol::operate(target.address, &target.token, &OperatorRequest::Status);
        Ok(runtime.block_on(asked)?)
    };
    let mut seen = Seen::default();
    // A supervisor that is not there at first is an error; one that goes away later comes back.
    seen.take(Ok(ask(&target)?));
    if args.once {
        print!("{}", once(&seen)?);
        return Ok(());
    }
    if !std::io::stdout().is_terminal() {
        bail!("standard output is no terminal: expected one, or --once");
    }
    let mut terminal = ratatui::try_init().context("the terminal")?;
    let shown = loop {
        if let Err(error) = terminal.draw(|frame| draw(frame, &seen)) {
            break Err(error.into());
        }
        match wants_to_end() {
            Ok(false) => seen.take(ask(&target)),
            Ok(true) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    ratatui::restore();
    shown
}

/// Waits until the next look is due, or for the wish to end.
fn wants_to_end() -> anyhow::Result<bool> {
    if !event::poll(ASK_EVERY)? {
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

fn once(seen: &Seen) -> anyhow::Result<String> {
    let backend = ratatui::backend::TestBackend::new(PLAIN_SIZE.0, PLAIN_SIZE.1);
    let mut terminal = ratatui::Terminal::new(backend)?;
    terminal.draw(|frame| draw(frame, seen))?;
    let buffer = terminal.backend().buffer();
    let width = usize::from(buffer.area.width);
    let symbols: Vec<&str> = buffer.content().iter().map(ratatui::buffer::Cell::symbol).collect();
    let lines: Vec<String> = symbols.chunks(width).map(|line| line.concat().trim_end().to_owned()).collect();
    Ok(format!("{}\n", lines.join("\n").trim_end()))
}

fn draw(frame: &mut Frame<'_>, seen: &Seen) {
    let Some(status) = &seen.status else { return };
    let nodes = status.nodes.len() as u16 + 3;
    let layers = status.load.len().min(16) as u16 + 2;
    let rows = [
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Length(8),
        Constraint::Length(nodes),
        Constraint::Length(layers),
        Constraint::Min(3),
    ];
    let [head, progress, curves, cluster, load, events] = Layout::vertical(rows).areas(frame.area());
    frame.render_widget(heading(status, seen.trouble.as_deref()), head);
    let ratio = (status.step.0 as f64 / status.steps.max(1) as f64).clamp(0.0, 1.0);
    let label = format!("step {} of {}", status.step, status.steps);
    frame
        .render_widget(Gauge::default().ratio(ratio).label(label).gauge_style(Style::new().blue()), progress);
    draw_curves(frame, curves, seen, status);
    draw_nodes(frame, cluster, status);
    draw_load(frame, load, status);
    draw_events(frame, events, status);
}

fn heading(status: &Status, trouble: Option<&str>) -> Paragraph<'static> {
    let activity = serde_json::to_value(status.activity).ok().and_then(|v| v.as_str().map(str::to_owned));
    let checkpoint = status.checkpoint.map_or_else(|| "none".to_owned(), |step| format!("step {step}"));
    let words =
        format!("  {}, epoch {}, checkpoint {checkpoint}", activity.unwrap_or_default(), status.epoch);
    let mut spans = vec![Span::from(status.run.clone()).bold(), Span::from(words)];
    spans.extend(trouble.map(|trouble| Span::from(format!("   {trouble}")).red()));
    Paragraph::new(Line::from(spans))
}

fn draw_curves(frame: &mut Frame<'_>, area: Rect, seen: &Seen, status: &Status) {
    let [left, right] = Layout::horizontal([Constraint::Percentage(50); 2]).areas(area);
    let losses = seen.losses.iter().map(|loss| loss.1);
    let (least, most) = losses.clone().fold((f64::MAX, f64::MIN), |(l, m), x| (l.min(x), m.max(x)));
    // A sparkline shows whole numbers from 0: the loss between its extremes, and never quite at the ground.
    let height = |loss: f64| 1 + ((loss - least) / (most - least).max(1e-9) * 1000.0) as u64;
    let heights: Vec<u64> = losses.map(height).collect();
    let title = status.loss.map_or_else(|| "loss".to_owned(), |loss| format!("loss {loss:.4}"));
    frame.render_widget(curve(title, &newest(&heights, left), Color::Blue), left);
    let speeds: Vec<u64> = seen.speeds.iter().copied().collect();
    let title = format!("{:.0} tokens/s", status.tokens_per_second.unwrap_or_default());
    frame.render_widget(curve(title, &newest(&speeds, right), Color::Green), right);
}

fn newest(values: &[u64], area: Rect) -> Vec<u64> {
    values[values.len().saturating_sub(usize::from(area.width.saturating_sub(2)))..].to_vec()
}

fn curve(title: String, values: &[u64], color: Color) -> Sparkline<'static> {
    Sparkline::default()
        .block(Block::bordered().title(title))
        .data(values.iter().copied())
        .style(Style::new().fg(color))
}

fn draw_nodes(frame: &mut Frame<'_>, area: Rect, status: &Status) {
    let rows = status.nodes.iter().map(|node| {
        let lanes: Vec<String> = node.lanes.iter().map(ToString::to_string).collect();
        let round_trip = node.links.iter().map(|link| link.round_trip_ms).fold(0.0, f64::max);
        let sent: u64 = node.links.iter().map(|link| link.sent_bytes).sum();
        Row::new([
            node.name.clone(),
            node.state.clone(),
            node.device.clone(),
            format!("{:.2}", node.capacity),
            node.shards.to_string(),
            format!("{round_trip:.1} ms"),
            format!("{:.1} MB", sent as f64 / 1e6),
            lanes.join(" "),
        ])
    });
    let widths = [16, 10, 8, 8, 7, 10, 10].map(Constraint::Length).into_iter().chain([Constraint::Min(8)]);
    let header = ["node", "state", "device", "speed", "shards", "slowest", "sent", "lanes"];
    let table =
        Table::new(rows, widths).header(Row::new(header).dim()).block(Block::bordered().title("cluster"));
    frame.render_widget(table, area);
}

/// A row per MoE layer, a cell per expert: the fuller, the more tokens.
fn draw_load(frame: &mut Frame<'_>, area: Rect, status: &Status) {
    const SHADES: [&str; 9] = [" ", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"];
    let row = |(layer, counts): (usize, &Vec<u64>)| {
        let even = counts.iter().sum::<u64>() as f64 / counts.len().max(1) as f64;
        let cells = counts.iter().map(|&count| {
            let fullness = count as f64 / even.max(1e-9);
            let shade = SHADES[((fullness * 4.0) as usize).min(8)];
            let color = if fullness > 2.0 { Color::Red } else { Color::Cyan };
            Span::styled(format!("{shade}{shade} "), Style::new().fg(color))
        });
        Line::from_iter(std::iter::once(Span::from(format!("{layer:>3}  "))).chain(cells))
    };
    let lines: Vec<Line<'_>> = status.load.iter().enumerate().map(row).collect();
    let title = "expert load by MoE layer: half full is even, red is over twice that";
    frame.render_widget(Paragraph::new(lines).block(Block::bordered().title(title)), area);
}

fn draw_events(frame: &mut Frame<'_>, area: Rect, status: &Status) {
    let lines = status.events.iter().rev().map(|text| {
        let event: serde_json::Value = serde_json::from_str(text).unwrap_or_default();
        let name = event["event"].as_str().unwrap_or_default().to_owned();
        let rest = event.as_object().into_iter().flatten();
        let rest = rest.filter(|(key, _)| !["event", "unix_ms", "at_step"].contains(&key.as_str()));
        let words: Vec<String> = rest.map(|(key, value)| format!("{key}={value}")).collect();
        format!("step {:<6} {name:<18} {}", event["at_step"].as_u64().unwrap_or_default(), words.join("  "))
    });
    frame.render_widget(List::new(lines).block(Block::bordered().title("events")), area);
}

#[cfg(test)]
mod tests {
    use super::*;
    use volary_core::machine::Activity;
    use volary_protocol::LinkReport;
    use volary_protocol::operator::{NodeStatus, SupervisorStatus};

    #[test]
    fn one_look_shows_progress_cluster_load_and_events() {
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
            capacity: 1.25,
            zone: String::new(),
            shards: 17,
            lanes: vec![0, 2],
            links,
            http: None,
        };
        let status = Status {
            run: "quickstart".into(),
            epoch: 4,
            step: 50,
            steps: 200,
            activity: Activity::Training,
            checkpoint: Some(40),
            load: vec![vec![10, 10, 10, 10], vec![40, 0, 0, 0]],
            loss: Some(3.25),
            tokens_per_second: Some(5000.0),
            predicted_step_ms: 0.0,
            supervisor: SupervisorStatus { pid: 2, address: "127.0.0.1:1".into() },
            nodes: vec![node],
            shards: Vec::new(),
            events: vec!["{\"unix_ms\":1,\"at_step\":7,\"event\":\"joined\",\"node\":\"node-1\"}".into()],
        };
        let mut seen = Seen::default();
        seen.take(Ok(OperatorReply::Status(Box::new(status))));
        seen.take(Err(anyhow::anyhow!("gone")));
        let text = once(&seen).expect("a look");
        for words in [
            "quickstart  training, epoch 4, checkpoint step 40   gone; trying again",
            "step 50 of 200",
            "loss 3.2500",
            "5000 tokens/s",
            "node-1           member",
            "1.5 ms     2.5 MB     0 2",
            "  0  ▄▄ ▄▄ ▄▄ ▄▄",
            "  1  ██",
            "step 7      joined             node=\"node-1\"",
        ] {
            assert!(text.contains(words), "{words}\n{text}");
        }
    }
}
