//! Chat templates: conversations as the text that a model was trained on.
//!
//! Templates are Jinja, rendered as Hugging Face does: blocks trimmed, `raise_exception`, `strftime_now` and Python's
//! `tojson` and string methods at hand, `{% generation %}` understood.

use std::ops::Range;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{AutoEscape, Environment, ErrorKind, context};
use serde::Serialize;
use serde_json::Value;

use crate::tokenizer::{SpecialTokens, Tokenizer};
use crate::{Error, Result, json};

const NAME: &str = "chat";

/// Instructions that rendering one conversation may take: far more than any real template, and seconds.
const FUEL: u64 = 20_000_000;

/// A compiled chat template.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special: SpecialTokens,
}

/// A conversation as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EncodedChat {
    /// The tokens of the whole conversation.
    pub ids: Vec<u32>,
    /// For each token, whether the assistant wrote it: what a loss is computed on.
    pub assistant: Vec<bool>,
}

impl ChatTemplate {
    /// The template of a model folder: `chat_template.jinja`, or `chat_template` in `tokenizer_config.json` (a string,
    /// or a list of named templates, of which `default` is taken). `None` when the folder has none.
    ///
    /// # Errors
    /// Files that cannot be read; [`Error::ChatTemplate`] when the template does not compile.
    pub fn load(folder: &Path) -> Result<Option<Self>> {
        let config_path = folder.join("tokenizer_config.json");
        let config = if config_path.exists() { json::read_object(&config_path)? } else { Default::default() };
        let special = SpecialTokens::read(&config);
        let file = folder.join("chat_template.jinja");
        let source = if file.exists() {
            json::read_text(&file)?
        } else {
            match config.get("chat_template") {
                None | Some(Value::Null) => return Ok(None),
                Some(Value::String(source)) => source.clone(),
                Some(Value::Array(named)) => default_template(named)
                    .ok_or_else(|| Error::format(&config_path, "chat_template has no template named \"default\""))?,
                Some(_) => return Err(Error::format(&config_path, "chat_template is neither a string nor a list")),
            }
        };
        Self::new(source, special).map(Some)
    }

    /// A template from its source.
    ///
    /// # Errors
    /// [`Error::ChatTemplate`] when it does not compile.
    pub fn new(source: String, special: SpecialTokens) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(failed)?;
        environment.set_syntax(syntax);
        environment.set_fuel(Some(FUEL));
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function(
            "raise_exception",
            |message: String| -> std::result::Result<String, minijinja::Error> {
                Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        environment.add_function("strftime_now", |format: String| strftime(&format, now()));
        environment.add_filter("tojson", to_json);
        environment.add_template_owned(NAME, without_generation_tags(&source)).map_err(failed)?;
        Ok(Self { environment, special })
    }

    /// The text of a conversation. `messages` are objects with `role` and `content`, and whatever else the template
    /// reads. `add_generation_prompt` appends what the assistant's next answer follows.
    ///
    /// # Errors
    /// [`Error::ChatTemplate`] when the template refuses the conversation.
    pub fn render(&self, messages: &[Value], add_generation_prompt: bool) -> Result<String> {
        let token = |token: &Option<String>| token.clone().unwrap_or_default();
        let context = context! {
            messages => Serde(messages), add_generation_prompt,
            bos_token => token(&self.special.bos), eos_token => token(&self.special.eos),
            pad_token => token(&self.special.pad), unk_token => token(&self.special.unknown),
            tools => (), documents => (),
        };
        self.environment.get_template(NAME).and_then(|template| template.render(context)).map_err(failed)
    }

    /// The text of a conversation, and the bytes of it that the assistant wrote.
    ///
    /// The assistant's part of a message is what the conversation up to and with it has beyond the conversation before
    /// it with the generation prompt: the answer and whatever ends the turn.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`]; [`Error::ChatTemplate`] for templates that write a turn differently when others
    /// follow, so that the parts cannot be told.
    pub fn render_with_answers(&self, messages: &[Value]) -> Result<(String, Vec<Range<usize>>)> {
        let text = self.render(messages, false)?;
        let mut answers = Vec::new();
        for (index, message) in messages.iter().enumerate() {
            if message.get("role").and_then(Value::as_str) != Some("assistant") {
                continue;
            }
            let before = self.render(&messages[..index], true)?;
            let after = self.render(&messages[..=index], false)?;
            if !text.starts_with(&after) {
                return Err(Error::ChatTemplate {
                    message: format!(
                        "message {index} is written differently when others follow, so its tokens cannot be told \
                         apart: give one conversation for each answer"
                    ),
                });
            }
            answers.push(common_prefix(&before, &after)..after.len());
        }
        Ok((text, answers))
    }

    /// The tokens of a conversation, and which of them the assistant wrote. A token that begins before an answer does
    /// not belong to it.
    ///
    /// # Errors
    /// As [`ChatTemplate::render_with_answers`]; those of the tokenizer.
    pub fn encode(&self, tokenizer: &Tokenizer, messages: &[Value]) -> Result<EncodedChat> {
        let (text, answers) = self.render_with_answers(messages)?;
        let tokens = tokenizer.encode_with_ranges(&text)?;
        let mut encoded =
            EncodedChat { ids: Vec::with_capacity(tokens.len()), assistant: Vec::with_capacity(tokens.len()) };
        for (id, range) in tokens {
            encoded.ids.push(id);
            encoded.assistant.push(answers.iter().any(|answer| answer.contains(&range.start)));
        }
        Ok(encoded)
    }
}

fn default_template(named: &[Value]) -> Option<String> {
    let default = named.iter().find(|template| template.get("name").and_then(Value::as_str) == Some("default"))?;
    default.get("template")?.as_str().map(str::to_owned)
}

/// Bytes that two texts begin with alike.
fn common_prefix(a: &str, b: &str) -> usize {
    a.char_indices().zip(b.chars()).find(|((_, a), b)| a != b).map_or(a.len().min(b.len()), |((index, _), _)| index)
}

/// `{% generation %} … {% endgeneration %}` marks the assistant's part for transformers. It prints nothing, as a
/// condition that is always true prints nothing.
fn without_generation_tags(source: &str) -> String {
    let mut output = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(begin) = rest.find("{%") {
        let Some(length) = rest[begin..].find("%}") else { break };
        let tag = &rest[begin + 2..begin + length];
        output.push_str(&rest[..begin + 2]);
        match tag.trim_matches(['-', '+', ' ', '\n', '\t', '\r']) {
            "generation" => output.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => output.push_str(&tag.replace("endgeneration", "endif")),
            _ => output.push_str(tag),
        }
        output.push_str("%}");
        rest = &rest[begin + length + 2..];
    }
    output + rest
}

fn failed(error: minijinja::Error) -> Error {
    let message = match (error.detail(), error.line()) {
        (Some(detail), Some(line)) => format!("line {line}: {detail}"),
        (Some(detail), None) => detail.to_owned(),
        _ => error.to_string(),
    };
    Error::ChatTemplate { message }
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`.
fn to_json(value: Serde<Value>, options: Kwargs) -> std::result::Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let fail = |error: serde_json::Error| minijinja::Error::new(ErrorKind::InvalidOperation, error.to_string());
    let mut output = Vec::new();
    match indent {
        Some(indent) => {
            let indent = " ".repeat(indent.min(16));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.0.serialize(&mut serde_json::Serializer::with_formatter(&mut output, formatter)).map_err(fail)?;
        }
        None => {
            value.0.serialize(&mut serde_json::Serializer::with_formatter(&mut output, PythonSpacing)).map_err(fail)?;
        }
    }
    String::from_utf8(output).map_err(|error| minijinja::Error::new(ErrorKind::InvalidOperation, error.to_string()))
}

/// A space after each comma and colon.
struct PythonSpacing;

impl serde_json::ser::Formatter for PythonSpacing {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |duration| duration.as_secs())
}

/// The directives of C's `strftime` that chat templates use, in UTC; others stay as they are.
fn strftime(format: &str, seconds: u64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const WEEKDAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (days, time) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil_date(days);
    let month_name = MONTHS[month as usize - 1];
    let weekday = WEEKDAYS[(days % 7) as usize];
    let mut output = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            output.push(character);
            continue;
        }
        match characters.next() {
            Some('Y') => output += &year.to_string(),
            Some('y') => output += &format!("{:02}", year % 100),
            Some('m') => output += &format!("{month:02}"),
            Some('d') => output += &format!("{day:02}"),
            Some('e') => output += &format!("{day:2}"),
            Some('B') => output += month_name,
            Some('b') => output += &month_name[..3],
            Some('A') => output += weekday,
            Some('a') => output += &weekday[..3],
            Some('H') => output += &format!("{:02}", time / 3600),
            Some('M') => output += &format!("{:02}", time / 60 % 60),
            Some('S') => output += &format!("{:02}", time % 60),
            Some('%') => output.push('%'),
            Some(other) => output.extend(['%', other]),
            None => output.push('%'),
        }
    }
    output
}

/// Year, month and day of a day counted from 1970-01-01, by Hinnant's algorithm
/// (<https://howardhinnant.github.io/date_algorithms.html#civil_from_days>).
pub fn civil_date(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const SMOLLM: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    fn template(source: &str) -> ChatTemplate {
        let special = SpecialTokens { bos: Some("<s>".to_owned()), eos: Some("</s>".to_owned()), ..Default::default() };
        ChatTemplate::new(source.to_owned(), special).unwrap()
    }

    fn conversation() -> Vec<Value> {
        vec![
            json!({"role": "user", "content": "Hé?"}),
            json!({"role": "assistant", "content": "Yes."}),
            json!({"role": "user", "content": "More"}),
            json!({"role": "assistant", "content": "No."}),
        ]
    }

    #[test]
    fn a_conversation_is_rendered_and_its_answers_are_found() {
        let template = template(SMOLLM);
        let (text, answers) = template.render_with_answers(&conversation()).unwrap();
        assert!(text.starts_with("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by"));
        let found: Vec<&str> = answers.iter().map(|answer| &text[answer.clone()]).collect();
        assert_eq!(found, ["Yes.<|im_end|>\n", "No.<|im_end|>\n"]);
        let prompt = template.render(&conversation()[..1], true).unwrap();
        assert!(prompt.ends_with("<|im_start|>user\nHé?<|im_end|>\n<|im_start|>assistant\n"), "{prompt}");
    }

    #[test]
    fn hugging_faces_extras_are_there() {
        let messages = conversation();
        let render = |source: &str| template(source).render(&messages, false).unwrap();
        assert_eq!(render("{{ bos_token }}{{ messages[0].content.strip().upper() }}{{ eos_token }}"), "<s>HÉ?</s>");
        assert_eq!(
            render(
                "{%- for m in messages %}\n    {% if loop.index > 1 %}{% break %}{% endif %}\n[{{ m.role }}]\n{%- endfor %}"
            ),
            "[user]"
        );
        assert_eq!(render("{% generation %}\nx{% endgeneration %}y{%- generation -%} z {%- endgeneration %}"), "xyz");
        assert_eq!(render("{{ {'a': [1, 'é<'], 'b': none} | tojson }}"), "{\"a\": [1, \"é<\"], \"b\": null}");
        assert_eq!(render("{{ [1] | tojson(indent=2) }}"), "[\n  1\n]");
        assert_eq!(render("{% if tools is none and not documents %}none{% endif %}"), "none");
        assert_eq!(render("{{ strftime_now('%Y') | int > 2024 }}"), "True");
    }

    #[test]
    fn the_idioms_of_released_templates_work() {
        // Pieces of the templates of Llama 3.1, Mistral and Qwen.
        let source = "{{- bos_token }}\n\
            {%- if not date_string is defined %}\n\
            {%- if strftime_now is defined %}{%- set date_string = '26 Jul 2024' %}{%- endif %}\n\
            {%- endif %}\n\
            {%- if messages[0]['role'] == 'system' %}\n\
            {%- set system_message = messages[0]['content']|trim %}\n\
            {%- set messages = messages[1:] %}\n\
            {%- else %}{%- set system_message = '' %}{%- endif %}\n\
            {%- set ns = namespace(count=0) %}\n\
            {%- for message in messages %}\n\
            {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\n\
            {{- raise_exception('roles must alternate') }}\n\
            {%- endif %}\n\
            {%- set ns.count = ns.count + 1 %}\n\
            {{- '<|' + message.role + '|>' + message['content'].split('</think>')[-1].lstrip('\\n') + eos_token }}\n\
            {%- endfor %}\n\
            {{- '(' ~ ns.count ~ date_string[:2] ~ system_message ~ ')' }}";
        let messages = [
            json!({"role": "system", "content": " be brief "}),
            json!({"role": "user", "content": "a"}),
            json!({"role": "assistant", "content": "<think>x</think>\n\nb"}),
        ];
        assert_eq!(
            template(source).render(&messages, false).unwrap(),
            "<s><|user|>a</s><|assistant|>b</s>(226be brief)"
        );
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(strftime("%d %b %Y, %A %H:%M:%S %%%q", 951_782_399), "28 Feb 2000, Monday 23:59:59 %%q");
        assert_eq!(strftime("%Y-%m-%d %a", 951_782_400), "2000-02-29 Tue");
        assert_eq!(strftime("%e %B %y", 1_763_856_000), "23 November 25");
        assert_eq!(strftime("%Y-%m-%d %A", 0), "1970-01-01 Thursday");
    }

    #[test]
    fn refusals_say_why() {
        let source = "{{ raise_exception('roles must alternate') }}";
        let message = template(source).render(&conversation(), false).unwrap_err().to_string();
        assert_eq!(message, "chat template: line 1: roles must alternate");
        let message = ChatTemplate::new("\n{% if %}".to_owned(), SpecialTokens::default()).unwrap_err().to_string();
        assert!(message.starts_with("chat template: line 2"), "{message}");
        let hours = "{% for i in range(9999) %}{% for j in range(9999) %}{% for k in range(9999) %}x{% endfor %}\
                     {% endfor %}{% endfor %}";
        let message = template(hours).render(&conversation(), false).unwrap_err().to_string();
        assert!(message.contains("engine ran out of fuel"), "{message}");
        let forgetful = "{% for m in messages %}{% if loop.last %}[{{ m.content }}]{% endif %}{% endfor %}";
        let message = template(forgetful).render_with_answers(&conversation()).unwrap_err().to_string();
        assert!(message.contains("message 1 is written differently when others follow"), "{message}");
    }
}
