/** What `npm test` and the machines read in TAP: each file is a subtest, and so is much within it. */

export interface TapResults {
  readonly passed: number;
  readonly failed: number;
  readonly skipped: number;
  /** Each file's own line. */
  readonly files: readonly string[];
  /** Each failed assertion under its subtests' names, with the YAML that tap puts behind it. */
  readonly failures: readonly { readonly title: string; readonly diagnosis: string }[];
}

export function readTap(text: string): TapResults {
  const lines = text.split('\n');
  const open: { indent: string; subtest: string; failures: number; assertions: number }[] = [];
  const files: string[] = [];
  const failures: { title: string; diagnosis: string }[] = [];
  const counts = { passed: 0, failed: 0, skipped: 0 };
  lines.forEach((line, index) => {
    const parts = /^( *)(?:# Subtest: (.*)|(not )?ok \d+(?: - (.*))?)$/.exec(line);
    if (!parts) return;
    const [, indent = '', subtest, not, title = ''] = parts;
    if (subtest !== undefined) {
      open.push({ indent, subtest, failures: 0, assertions: 0 });
      return;
    }
    // A process that died has not ended its subtests.
    while ((open.at(-1)?.indent.length ?? 0) > indent.length) open.pop();
    const own = open.at(-1);
    const ends = own?.indent === indent && title.startsWith(own.subtest);
    if (ends) open.pop();
    if (!ends || own.assertions === 0) {
      for (const each of open) each.assertions++;
      counts[/ # (SKIP|TODO)/i.test(title) ? 'skipped' : not ? 'failed' : 'passed']++;
    }
    if (not && !(ends && own.failures > 0)) {
      for (const each of open) each.failures++;
      const names = [...open.map((each) => each.subtest), title].join(' > ');
      failures.push({ title: names, diagnosis: diagnosis(lines, index + 1, indent.length + 2) });
    }
    if (indent === '' && title) files.push(`${not ? 'not ok' : 'ok'}: ${title.replace(/# time=(.*)/, '($1)')}`);
  });
  return { ...counts, files, failures };
}

/** The YAML block behind a line. */
function diagnosis(lines: readonly string[], start: number, indent: number): string {
  if (lines[start]?.trim() !== '---') return '';
  const end = lines.findIndex((line, index) => index > start && line.slice(indent) === '...');
  return lines
    .slice(start + 1, end)
    .map((line) => `  ${line.slice(indent)}`)
    .join('\n');
}
