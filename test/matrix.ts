import { join } from 'node:path';
import { sections } from './conformance/cases/index.ts';
import { type Published, published, resultsFolder, type Tally } from './conformance/tally.ts';
import { machines } from './machines/machines.ts';

// `npm run test:matrix`: which conformance case held where, from what `npm test` and `npm run test:machines` left. `--cases` shows each.

/** What a kernel made of a case. */
type Cell = 'agrees' | 'DIFFERS' | 'not run' | { readonly missing: string };

interface Column {
  readonly name: string;
  readonly release: string;
  readonly cells: ReadonlyMap<string, Cell>;
  /** What to do about an empty column. */
  readonly advice?: string;
}

function column(name: string, found: Tally | undefined, advice: string): Column {
  const cells = new Map<string, Cell>();
  for (const id of found?.agree ?? []) cells.set(id, 'agrees');
  for (const id of found?.disagree ?? []) cells.set(id, 'DIFFERS');
  for (const [missing, ids] of Object.entries(found?.notApplicable ?? {}))
    for (const id of ids) cells.set(id, { missing });
  const release = /\d+\.\d+(\.\d+)?/.exec(found?.kernel ?? '')?.[0];
  return { name, release: release ?? '–', cells, ...(!found && { advice }) };
}

/** The first line of why there is nothing, or the command that changes it. */
function adviceFor(found: Published | undefined, command: string): string {
  return found?.reason ? `not run: ${found.reason.split('\n')[0]}` : `not run: ${command}`;
}

function columns(): Column[] {
  const models = published('software');
  const software = (name: string, pattern: RegExp) =>
    column(name, models?.tallies.filter(({ kernel }) => pattern.test(kernel)).at(-1), adviceFor(models, 'npm test'));
  const host = published('linux');
  return [
    software('software x86', /^software \S+ x86_64$/),
    software('software arm64', /^software \S+ aarch64$/),
    column('this host', host?.tallies[0], adviceFor(host, 'npm test')),
    ...machines.flatMap(({ name, always }) => {
      const found = published('linux', join(resultsFolder, 'machines', name));
      if (!found && !always) return [];
      return column(name, found?.tallies[0], adviceFor(found, `npm run test:machines -- ${name}`));
    }),
  ];
}

function cellOf({ cells }: Column, id: string): Cell {
  return cells.get(id) ?? 'not run';
}

/** '12', '12 + 3 n/a', '12, 1 DIFFERS' */
function count(column: Column, ids: readonly string[]): string {
  const cells = ids.map((id) => cellOf(column, id));
  const of = (wanted: Cell) => cells.filter((cell) => cell === wanted).length;
  const [agrees, differs, left] = [of('agrees'), of('DIFFERS'), of('not run')];
  const missing = cells.length - agrees - differs - left;
  if (left === cells.length) return 'not run';
  return [
    agrees > 0 || missing < cells.length ? String(agrees) : '',
    differs > 0 ? `${differs} DIFFER${differs > 1 ? '' : 'S'}` : '',
    missing > 0 ? `${missing} n/a` : '',
    left > 0 ? `${left} not run` : '',
  ]
    .filter(Boolean)
    .join(', ');
}

function print(rows: readonly (readonly string[])[]): void {
  const widths = rows[0]?.map((_, index) => Math.max(...rows.map((row) => row[index]?.length ?? 0))) ?? [];
  for (const row of rows)
    console.log(
      row
        .map((text, index) => text.padEnd(widths[index] ?? 0))
        .join('  ')
        .trimEnd(),
    );
}

const all = columns();
const cases = sections.flatMap((section) => section.cases);
const head = [
  ['', ...all.map(({ name }) => name)],
  ['kernel', ...all.map(({ release }) => release)],
];

if (process.argv.includes('--cases')) {
  const notes: string[] = [];
  const text = (cell: Cell): string => {
    if (typeof cell === 'string') return cell;
    if (!notes.includes(cell.missing)) notes.push(cell.missing);
    return `n/a ${notes.indexOf(cell.missing) + 1}`;
  };
  const short = (sentence: string) => (sentence.length > 60 ? `${sentence.slice(0, 59)}…` : sentence);
  const rows = sections.flatMap(({ title, cases }) => [
    [`── ${title}`],
    ...cases.map(({ id, sentence }) => [short(`${id}: ${sentence}`), ...all.map((column) => text(cellOf(column, id)))]),
  ]);
  print([...head, ...rows]);
  console.log('\nnot applicable:');
  for (const [index, missing] of notes.entries()) console.log(`  ${index + 1}: ${missing}`);
} else {
  const rows = sections.map(({ title, cases }) => {
    const ids = cases.map(({ id }) => id);
    return [title.length > 44 ? `${title.slice(0, 43)}…` : title, ...all.map((column) => count(column, ids))];
  });
  const ids = cases.map(({ id }) => id);
  print([...head, ...rows, ['all', ...all.map((column) => count(column, ids))]]);
  console.log('\nnot applicable, and why:');
  for (const column of all) {
    const reasons = new Map<string, string[]>();
    for (const { id } of cases) {
      const cell = cellOf(column, id);
      if (typeof cell === 'object') reasons.set(cell.missing, [...(reasons.get(cell.missing) ?? []), id]);
    }
    for (const [missing, ids] of reasons) console.log(`  ${column.name}: ${missing}: ${ids.join(', ')}`);
  }
}

const differing = all.flatMap((column) =>
  cases
    .filter(({ id }) => cellOf(column, id) === 'DIFFERS')
    .map(({ id, sentence }) => `${column.name}: ${id}: ${sentence}`),
);
if (differing.length > 0) console.log(`\nDIFFERS:\n  ${differing.join('\n  ')}`);
for (const { name, advice } of all) if (advice) console.log(`${name}: ${advice}`);
process.exitCode = differing.length > 0 ? 1 : 0;
