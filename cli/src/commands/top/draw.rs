//! The widgets of `volary top`.

use super::View;
use crate::commands::operate::status::{activity, lanes};
use crate::limits::TOP_LAYERS_SHOWN;
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Gauge, List, Paragraph, Row, Sparkline, Table};
use volary_protocol::operator::Status;

/// Draws the view.
pub(super) fn draw(frame: &mut Frame<'_>, view: &View) {
    let Some(status) = &view.status else { return };
    let nodes = status.nodes.len() as u16 + 3;
    let layers = status.load.len().min(TOP_LAYERS_SHOWN) as u16 + 2;
    let rows = [
        Constraint::Length(1),
        Constraint::Length(1),
        Constraint::Length(8),
        Constraint::Length(nodes),
        Constraint::Length(layers),
        Constraint::Min(3),
    ];
    let [head, progress, curves, cluster, load, events] = Layout::vertical(rows).areas(frame.area());
    frame.render_widget(heading(status, view.error.as_deref()), head);
    let ratio = (status.step.0 as f64 / status.steps.max(1) as f64).clamp(0.0, 1.0);
    let label = format!("step {} of {}", status.step, status.steps);
    frame
        .render_widget(Gauge::default().ratio(ratio).label(label).gauge_style(Style::new().blue()), progress);
    draw_curves(frame, curves, view, status);
    draw_nodes(frame, cluster, status);
    draw_load(frame, load, status);
    draw_events(frame, events, status);
}

fn heading(status: &Status, error: Option<&str>) -> Paragraph<'static> {
    let checkpoint = status.checkpoint.map_or_else(|| "none".to_owned(), |step| format!("step {step}"));
    let state = format!("  {}, epoch {}, checkpoint {checkpoint}", activity(status), status.epoch);
    let mut spans = vec![Span::from(status.run.clone()).bold(), Span::from(state)];
    spans.extend(error.map(|error| Span::from(format!("   {error}")).red()));
    Paragraph::new(Line::from(spans))
}

fn draw_curves(frame: &mut Frame<'_>, area: Rect, view: &View, status: &Status) {
    let [left, right] = Layout::horizontal([Constraint::Percentage(50); 2]).areas(area);
    let losses = view.losses.iter().map(|loss| loss.1);
    let (least, most) = losses.clone().fold((f64::MAX, f64::MIN), |(l, m), x| (l.min(x), m.max(x)));
    // A sparkline shows whole numbers from 0: the loss relative to its extremes, at least 1.
    let height = |loss: f64| 1 + ((loss - least) / (most - least).max(1e-9) * 1000.0) as u64;
    let heights: Vec<u64> = losses.map(height).collect();
    let title = status.loss.map_or_else(|| "loss".to_owned(), |loss| format!("loss {loss:.4}"));
    frame.render_widget(curve(title, &newest(&heights, left), Color::Blue), left);
    let speeds: Vec<u64> = view.speeds.iter().copied().collect();
    let title = format!("{:.0} tokens/s", status.tokens_per_second.unwrap_or_default());
    frame.render_widget(curve(title, &newest(&speeds, right), Color::Green), right);
}

/// The newest values that fit into an area with a border.
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
            lanes(node),
        ])
    });
    let widths = [16, 10, 8, 8, 7, 10, 10].map(Constraint::Length).into_iter().chain([Constraint::Min(8)]);
    let header = ["node", "state", "device", "capacity", "shards", "max RTT", "sent", "lanes"];
    let table =
        Table::new(rows, widths).header(Row::new(header).dim()).block(Block::bordered().title("cluster"));
    frame.render_widget(table, area);
}

/// A row per MoE layer, a cell per expert with its share of the tokens.
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
    let title = "expert load by MoE layer: half-filled is even, red is over twice the even share";
    frame.render_widget(Paragraph::new(lines).block(Block::bordered().title(title)), area);
}

fn draw_events(frame: &mut Frame<'_>, area: Rect, status: &Status) {
    let lines = status.events.iter().rev().map(|text| {
        let event: serde_json::Value = serde_json::from_str(text).unwrap_or_default();
        let name = event["event"].as_str().unwrap_or_default().to_owned();
        let rest = event.as_object().into_iter().flatten();
        let rest = rest.filter(|(key, _)| !["event", "unix_ms", "at_step"].contains(&key.as_str()));
        let attributes: Vec<String> = rest.map(|(key, value)| format!("{key}={value}")).collect();
        format!(
            "step {:<6} {name:<18} {}",
            event["at_step"].as_u64().unwrap_or_default(),
            attributes.join("  ")
        )
    });
    frame.render_widget(List::new(lines).block(Block::bordered().title("events")), area);
}
