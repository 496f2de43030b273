//! PTX text cut into tokens.

/// A piece of the text, with the line that it stands on (from 1).
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Token<'a> {
    pub line: usize,
    pub kind: TokenKind<'a>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum TokenKind<'a> {
    /// A name, a register, a directive or an instruction with all its qualifiers: `row`, `%r1`, `.reg`, `ld.global.f32`.
    Word(&'a str),
    /// A number.
    Number(Number),
    /// A text in quotes.
    Text,
    /// Any other character that means something.
    Sign(char),
}

/// A number as it is written.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Number {
    /// Decimal, hexadecimal, octal or binary.
    Integer(u64),
    /// The bits of a single-precision number (`0f3F800000`).
    F32(u32),
    /// Double precision: `0d3FF0000000000000`, or decimal with a point or an exponent.
    F64(f64),
}

/// The tokens of a text; comments are left out.
///
/// # Errors
/// The line, and what is wrong there.
pub(super) fn tokens(text: &str) -> Result<Vec<Token<'_>>, (usize, String)> {
    let mut tokens = Vec::with_capacity(text.len() / 4);
    let bytes = text.as_bytes();
    let (mut at, mut line) = (0, 1);
    while at < bytes.len() {
        let byte = bytes[at];
        let rest = &text[at..];
        let kind = match byte {
            b'\n' => {
                line += 1;
                at += 1;
                continue;
            }
            b' ' | b'\t' | b'\r' => {
                at += 1;
                continue;
            }
            b'/' if rest.starts_with("//") => {
                at += rest.find('\n').unwrap_or(rest.len());
                continue;
            }
            b'/' if rest.starts_with("/*") => {
                let Some(length) = rest.find("*/") else { return Err((line, "this comment has no end".to_owned())) };
                line += rest[..length].matches('\n').count();
                at += length + 2;
                continue;
            }
            b'"' => {
                let Some(length) = rest[1..].find(['"', '\n']).filter(|&end| bytes[at + 1 + end] == b'"') else {
                    return Err((line, "this quoted text has no end".to_owned()));
                };
                at += length + 2;
                TokenKind::Text
            }
            b'0'..=b'9' => {
                let length = number_length(rest);
                at += length;
                match number(&rest[..length]) {
                    Some(number) => TokenKind::Number(number),
                    None => return Err((line, format!("`{}` is no number", &rest[..length]))),
                }
            }
            _ if byte.is_ascii_alphabetic() || b"_$%.".contains(&byte) => {
                let length = word_length(rest);
                at += length;
                TokenKind::Word(&rest[..length])
            }
            b',' | b';' | b':' | b'{' | b'}' | b'[' | b']' | b'(' | b')' | b'<' | b'>' | b'@' | b'!' | b'+' | b'-'
            | b'|' | b'=' => {
                at += 1;
                TokenKind::Sign(byte as char)
            }
            _ => {
                let character = rest.chars().next().unwrap_or_default();
                return Err((line, format!("the character `{}` means nothing here", character.escape_default())));
            }
        };
        tokens.push(Token { line, kind });
    }
    Ok(tokens)
}

/// Bytes of the word at the beginning: letters, digits, `_$.`, and `::` within qualifiers such as `.L1::no_allocate`.
fn word_length(text: &str) -> usize {
    let bytes = text.as_bytes();
    let mut length = 1;
    while length < bytes.len() {
        let byte = bytes[length];
        if byte.is_ascii_alphanumeric() || b"_$.".contains(&byte) {
            length += 1;
        } else if bytes[length..].starts_with(b"::") {
            length += 2;
        } else {
            break;
        }
    }
    length
}

/// Bytes of the number at the beginning, the sign of an exponent among them.
fn number_length(text: &str) -> usize {
    let bytes = text.as_bytes();
    let decimal = !(bytes.len() > 1 && bytes[0] == b'0' && bytes[1].is_ascii_alphabetic());
    let mut length = 1;
    while length < bytes.len() {
        let byte = bytes[length];
        let exponent_sign = decimal && b"+-".contains(&byte) && b"eE".contains(&bytes[length - 1]);
        if !byte.is_ascii_alphanumeric() && byte != b'.' && !exponent_sign {
            break;
        }
        length += 1;
    }
    length
}

fn number(text: &str) -> Option<Number> {
    let hexadecimal = |digits: &str, count: usize| {
        u64::from_str_radix(digits, 16).ok().filter(|_| digits.len() == count && !digits.starts_with('+'))
    };
    let (prefix, digits) = text.split_at(text.len().min(2));
    match prefix {
        "0f" | "0F" => Some(Number::F32(hexadecimal(digits, 8)? as u32)),
        "0d" | "0D" => Some(Number::F64(f64::from_bits(hexadecimal(digits, 16)?))),
        "0x" | "0X" => u64::from_str_radix(digits.trim_end_matches('U'), 16).ok().map(Number::Integer),
        "0b" | "0B" => u64::from_str_radix(digits.trim_end_matches('U'), 2).ok().map(Number::Integer),
        _ if text.contains(['.', 'e', 'E']) => text.parse().ok().map(Number::F64),
        _ => {
            let digits = text.trim_end_matches('U');
            let octal = digits.len() > 1 && digits.starts_with('0');
            u64::from_str_radix(digits, if octal { 8 } else { 10 }).ok().map(Number::Integer)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds(text: &str) -> Vec<TokenKind<'_>> {
        tokens(text).unwrap().into_iter().map(|token| token.kind).collect()
    }

    #[test]
    fn an_instruction_is_one_word_with_its_qualifiers() {
        use TokenKind::{Number as N, Sign, Word};
        assert_eq!(
            kinds("@!%p1 ld.global.L1::no_allocate.f32 %f1, [%rd1+-4]; // load"),
            [
                Sign('@'),
                Sign('!'),
                Word("%p1"),
                Word("ld.global.L1::no_allocate.f32"),
                Word("%f1"),
                Sign(','),
                Sign('['),
                Word("%rd1"),
                Sign('+'),
                Sign('-'),
                N(Number::Integer(4)),
                Sign(']'),
                Sign(';'),
            ]
        );
        assert_eq!(kinds("L1: %tid.x"), [Word("L1"), Sign(':'), Word("%tid.x")]);
    }

    #[test]
    fn numbers_of_every_form() {
        let numbers = "0 12 012 0x1F 0b101 7U 0f3F800000 0d3FF0000000000000 1.5 2e-3";
        let expected = [
            Number::Integer(0),
            Number::Integer(12),
            Number::Integer(10),
            Number::Integer(31),
            Number::Integer(5),
            Number::Integer(7),
            Number::F32(0x3f80_0000),
            Number::F64(1.0),
            Number::F64(1.5),
            Number::F64(0.002),
        ];
        assert_eq!(kinds(numbers), expected.map(TokenKind::Number));
        for wrong in ["0f3F8", "0x", "12z", "0f3F80000000", "99999999999999999999"] {
            assert!(tokens(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn comments_count_lines() {
        let tokens = tokens("/* one\ntwo */ a // three\nb").unwrap();
        assert_eq!(tokens.iter().map(|token| token.line).collect::<Vec<_>>(), [2, 3]);
        assert_eq!(super::tokens("a\n/* no end").unwrap_err().0, 2);
        assert_eq!(super::tokens("a\n\n ? ").unwrap_err().0, 3);
    }
}
