import { styleText } from 'node:util';
import { hex } from '../format.ts';
import { GiB, KiB, MiB, TiB } from '../uapi.ts';

/** Widest line the CLI prints. */
export const COLUMNS = 80;

export type Format = Parameters<typeof styleText>[0];
/** Colours text, or leaves it as it is. */
export type Paint = (format: Format, text: string) => string;

/** Colours on a terminal that has them; hasColors() honours NO_COLOR and TERM=dumb. */
export function paintFor(stream: NodeJS.WriteStream): Paint {
  const colours = stream.isTTY && stream.hasColors();
  return (format, text) => (colours ? styleText(format, text) : text);
}

const units = [
  [TiB, 'TiB'],
  [GiB, 'GiB'],
  [MiB, 'MiB'],
  [KiB, 'KiB'],
] as const;

/** An exact amount: '0', '32 MiB', '32 MiB + 8 KiB'. */
export function amount(bytes: number): string {
  const terms: string[] = [];
  let rest = bytes;
  for (const [size, name] of units) {
    const count = Math.floor(rest / size);
    if (count > 0) terms.push(`${count} ${name}`);
    rest -= count * size;
  }
  if (rest > 0) terms.push(`${rest} bytes`);
  return terms.join(' + ') || '0';
}

/** A place: '4.25 GiB', '2625 MiB' where two digits say it exactly, otherwise hexadecimal. */
export function place(address: number): string {
  const [size, name] = units.find(([size]) => address >= size && (address * 100) % size === 0) ?? [1, ''];
  return address === 0 ? '0' : size > 1 ? `${address / size} ${name}` : hex(address);
}

/** A number as a program would write it: '512 * MiB'. */
export function code(bytes: number): string {
  const [size, name] = units.find(([size]) => bytes >= size && bytes % size === 0) ?? [1, ''];
  if (size === 1) return bytes < 10 ? String(bytes) : hex(bytes);
  if (bytes === size) return name;
  return `${bytes / size} * ${name}`;
}

/** Words in lines of at most `COLUMNS`, each behind the indent; the first line behind `lead` instead, when there is one. */
export function wrap(text: string, indent = '', lead = indent): string[] {
  return text.split('\n').flatMap((line, index) => wrapLine(line.trim(), indent, index === 0 ? lead : indent));
}

function wrapLine(text: string, indent: string, lead: string): string[] {
  const lines: string[] = [];
  let line = lead;
  let empty = true;
  for (const word of text.split(' ')) {
    if (!empty && line.length + 1 + word.length > COLUMNS) {
      lines.push(line);
      line = indent;
      empty = true;
    }
    line += empty ? word : ` ${word}`;
    empty = false;
  }
  return [...lines, line];
}
