//! A trace as one page that needs nothing else: the ways of its tokens over layers, experts and nodes, and its spans in time.

use super::token::token_ways;
use crate::store::Trace;
use serde_json::json;

const PAGE: &str = include_str!("trace.html");

/// The page.
#[must_use]
pub fn html(trace: &Trace, token: Option<&str>) -> String {
    let data = json!({
        "name": trace.name(),
        "step": trace.step(),
        "spans": trace.spans,
        "ways": token_ways(trace),
        "token": token,
    });
    // Nothing in the data may end the script.
    let data = data.to_string().replace('<', "\\u003c");
    PAGE.replace("\"VOLARY_TRACE\"", &data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::testing::step;

    #[test]
    fn no_text_of_a_token_can_end_the_script() {
        let mut trace = step();
        let text = "</script><script>alert(1)</script>";
        trace.spans[4].attributes.insert("volary.token.text".into(), text.into());
        let page = html(&trace, None);
        assert!(!page.contains("alert(1)</script>"));
        assert_eq!(page.matches("</script>").count(), PAGE.matches("</script>").count());
        assert!(page.contains("\"layer\":2"));
    }
}
