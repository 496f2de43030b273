//! What of a written text is the answer, and whether it is the right one.

use std::str::FromStr;
use std::sync::LazyLock;

use regex::Regex;

/// Where the answer stands in what a model wrote.
#[derive(Clone, Debug)]
pub enum Extract {
    /// The last number where the right answer is a number; everything otherwise.
    Auto,
    /// Everything that was written.
    Whole,
    /// The last number.
    LastNumber,
    /// The number behind the first `####`, or the rest of its line where there is none (GSM8K).
    Hashes,
    /// What is inside the last `\boxed{…}` (MATH).
    Boxed,
    /// What the first group of the last match matched, or the match where there is no group.
    Regex(Regex),
}

impl FromStr for Extract {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "whole" => Ok(Self::Whole),
            "last-number" => Ok(Self::LastNumber),
            "####" | "gsm8k" => Ok(Self::Hashes),
            "boxed" => Ok(Self::Boxed),
            _ => match text.strip_prefix("regex:") {
                Some(pattern) => Regex::new(pattern).map(Self::Regex).map_err(|error| error.to_string()),
                None => Err("expected auto, whole, last-number, ####, boxed or regex:PATTERN".to_owned()),
            },
        }
    }
}

impl Extract {
    /// The answer in a text; `None` where it has none. `numeric`: the right answer is a number.
    pub fn answer(&self, written: &str, numeric: bool) -> Option<String> {
        let found = match self {
            Self::Auto if numeric => last_number(written),
            Self::Auto | Self::Whole => Some(written),
            Self::LastNumber => last_number(written),
            Self::Hashes => {
                let line = written.split_once("####").and_then(|(_, after)| after.trim_start().lines().next());
                line.map(|line| first_number(line).unwrap_or(line))
            }
            Self::Boxed => boxed(written),
            Self::Regex(pattern) => {
                let captures = pattern.captures_iter(written).last()?;
                captures.get(1).or_else(|| captures.get(0)).map(|found| found.as_str())
            }
        };
        found.map(|found| found.trim().to_owned())
    }
}

/// Whether what was written is one of the right answers: word by word, whatever the white space and the case; where a right
/// answer is a number, the last number written.
pub(crate) fn is_right(right: &[String], written: &str) -> bool {
    right.iter().any(|right| {
        let numeric = number(right).is_some();
        Extract::Auto.answer(written, numeric).is_some_and(|answer| same(&answer, right))
    })
}

/// Whether two answers are the same: as numbers where both are, word by word otherwise.
pub(crate) fn same(answer: &str, right: &str) -> bool {
    match (number(answer), number(right)) {
        (Some(answer), Some(right)) => answer == right,
        _ => {
            let plain = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase();
            plain(answer) == plain(right)
        }
    }
}

/// A text that is a number and nothing else, in the form that equal numbers share: without thousands' commas, currency or percent
/// signs, a trailing dot, leading zeros and zeros after the last decimal place.
pub(crate) fn number(text: &str) -> Option<String> {
    let text = text.trim().trim_end_matches('.').trim_end_matches('%').trim();
    let (sign, text) = match text.strip_prefix('-') {
        Some(rest) => ("-", rest),
        None => ("", text.strip_prefix('+').unwrap_or(text)),
    };
    let text = text.trim().trim_start_matches('$').trim().replace(',', "");
    let (whole, decimals) = text.split_once('.').unwrap_or((&text, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(whole) || !digits(decimals) || (whole.is_empty() && decimals.is_empty()) {
        return None;
    }
    let (whole, decimals) = (whole.trim_start_matches('0'), decimals.trim_end_matches('0'));
    let whole = if whole.is_empty() { "0" } else { whole };
    let sign = if whole == "0" && decimals.is_empty() { "" } else { sign };
    Some(if decimals.is_empty() { format!("{sign}{whole}") } else { format!("{sign}{whole}.{decimals}") })
}

/// The numbers of a text, each with its sign, currency and thousands' commas.
fn numbers(text: &str) -> impl Iterator<Item = &str> {
    // A minus right behind a digit, a letter or a bracket takes away.
    static NUMBER: LazyLock<Option<Regex>> =
        LazyLock::new(|| Regex::new(r"(?:(?:^|[^\w)])-)?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)").ok());
    let found = NUMBER.iter().flat_map(|number| number.find_iter(text));
    found.map(|number| {
        let number = number.as_str();
        let sign = number.find('-').unwrap_or_default();
        number[sign..].trim_end_matches(',')
    })
}

fn first_number(text: &str) -> Option<&str> {
    numbers(text).next()
}

fn last_number(text: &str) -> Option<&str> {
    numbers(text).last()
}

/// The inside of the last `\boxed{…}` whose braces close.
fn boxed(text: &str) -> Option<&str> {
    const OPENING: &str = "\\boxed{";
    let start = text.rfind(OPENING)? + OPENING.len();
    let mut depth = 1;
    for (index, byte) in text[start..].bytes().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(&text[start..start + index]);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_its_words_or_its_last_number() {
        let right = |right: &str, written: &str| is_right(&[right.to_owned()], written);
        assert!(right("the Constitution", " The  constitution\n"));
        assert!(!right("the Constitution", "the Constitution of 1787"));
        assert!(right("1,200", "3 * 400 = 1200"));
        assert!(right("-7", "so the answer is -7."));
        assert!(!right("7", "so the answer is -7."));
        assert!(!right("7", "no idea"));
        assert!(right("0.5", "1/2 = 0.5"));
        assert!(right("3", "it is 10-3"), "the last number of a difference is its second term");
    }

    #[test]
    fn each_way_finds_its_answer() {
        let find = |way: &str, text: &str| way.parse::<Extract>().unwrap().answer(text, true);
        let is = |answer: &str| Some(answer.to_owned());
        assert_eq!(find("####", "60-15-25=20\n#### 20\nmore"), is("20"));
        assert_eq!(find("gsm8k", "#### 1,234 apples\nQuestion: …\n#### 7"), is("1,234"));
        assert_eq!(find("####", "#### none"), is("none"));
        assert_eq!(find("####", "no mark 20"), None);
        assert_eq!(find("boxed", r"so \boxed{1} or rather \boxed{\frac{1}{2}}."), is(r"\frac{1}{2}"));
        assert_eq!(find("boxed", r"\boxed{unclosed"), None);
        assert_eq!(find("last-number", "first 7, then $1,250.50."), is("$1,250.50"));
        assert_eq!(find("last-number", "none"), None);
        for (text, last) in [
            ("a loss of -$5", "-$5"),
            ("it is .5", ".5"),
            ("10-3", "3"),
            ("(2)-7", "7"),
            ("-7.", "-7"),
            ("1, 2, 3,", "3"),
            ("5 - 3", "3"),
            ("x=-4", "-4"),
            ("$1,250.50.", "$1,250.50"),
        ] {
            assert_eq!(find("last-number", text), is(last), "{text}");
        }
        assert_eq!(find("regex:answer is ([A-D])", "the answer is A. No, the answer is C!"), is("C"));
        assert_eq!(find("regex:[A-D]", "B or D"), is("D"));
        assert_eq!(find("whole", " as it is \n"), is("as it is"));
        assert_eq!(find("auto", "it is 4 apples"), is("4"));
        assert_eq!("auto".parse::<Extract>().unwrap().answer("it is 4 apples", false), is("it is 4 apples"));
        assert!("regex:(".parse::<Extract>().is_err());
        assert!("last".parse::<Extract>().unwrap_err().contains("regex:PATTERN"));
    }

    #[test]
    fn equal_numbers_are_the_same() {
        for (a, b) in [
            ("1,234", "1234"),
            ("$20", "20"),
            ("20.", "20.0"),
            ("-0", "0"),
            ("50%", "50"),
            ("007", "7"),
            (".5", "0.50"),
        ] {
            assert!(same(a, b), "{a} and {b}");
        }
        for (a, b) in [("1", "-1"), ("1.5", "15"), ("1e3", "1000"), ("", "0"), ("twenty", "20")] {
            assert!(!same(a, b), "{a} and {b}");
        }
    }
}
