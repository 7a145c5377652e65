//! A trace as one self-contained web page: the paths of sampled tokens over layers, experts and nodes, and a
//! timeline of the spans.

use super::token::token_paths;
use crate::store::Trace;
use serde_json::json;

const PAGE: &str = include_str!("trace.html");

/// The page of a trace; it opens with the paths of the tokens whose text is `token`, if given.
#[must_use]
pub fn html(trace: &Trace, token: Option<&str>) -> String {
    let data = json!({
        "name": trace.name(),
        "step": trace.step(),
        "spans": trace.spans,
        "paths": token_paths(trace),
        "token": token,
    });
    // No data may close the script element.
    let data = data.to_string().replace('<', "\\u003c");
    PAGE.replace("\"VOLARY_TRACE\"", &data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::testing::step;

    #[test]
    fn no_token_text_can_close_the_script_element() {
        let mut trace = step();
        let text = "</script><script>alert(1)</script>";
        trace.spans[4].attributes.insert("volary.token.text".into(), text.into());
        let page = html(&trace, None);
        assert!(!page.contains("alert(1)</script>"));
        assert_eq!(page.matches("</script>").count(), PAGE.matches("</script>").count());
        assert!(page.contains("\"layer\":2"));
    }
}
