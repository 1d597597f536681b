// npm run bench: what this package costs, each number with its bar. Every section runs in a process of its own, so that
// none finds code that another has warmed up, or its garbage.
//
//   --json      one line of JSON instead of tables
//   --full      100 000 cycles, however long they take
//   <section>…  only these
//
// A bar that is missed is printed, and is no failure: times depend on the machine. The exit code is 0.
import { spawnSync } from 'node:child_process';
import { arch, cpus, release } from 'node:os';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { benchCalls } from './calls.ts';
import { benchCopies } from './copies.ts';
import { benchCycles } from './cycles.ts';
import { benchHandOver } from './hand_over.ts';
import { meetsBar, type Result, type Row } from './measure.ts';
import { benchConversions, benchModel } from './model.ts';
import { benchPlanning } from './planning.ts';
import { benchRanges } from './ranges.ts';
import { benchVcpu } from './vcpu.ts';

interface Section {
  readonly title: string;
  readonly run: (full: boolean) => Result[] | Promise<Result[]>;
}

const sections: Readonly<Record<string, Section>> = {
  calls: { title: 'System calls on KVM, against the same calls in a C loop', run: benchCalls },
  vcpu: { title: 'vCPU: exits against a C loop on the same guest, and commands of the agent', run: benchVcpu },
  copies: { title: 'Guarded copies and views, against memcpy', run: benchCopies },
  conversions: { title: 'Software kernel: many conversions', run: benchConversions },
  model: { title: 'Software kernel: many ranges, and single calls', run: benchModel },
  planning: { title: 'A conversion, and what is beside it', run: benchPlanning },
  ranges: { title: 'RangeMap', run: benchRanges },
  handover: { title: 'Hand-over: how long the guest stands still', run: benchHandOver },
  cycles: { title: 'Create and close VM, guest_memfd, slots and windows', run: benchCycles },
};

const { values: options, positionals } = parseArgs({
  allowPositionals: true,
  options: { json: { type: 'boolean' }, full: { type: 'boolean' }, here: { type: 'boolean' } },
});
const unknown = positionals.filter((name) => !Object.hasOwn(sections, name));
if (unknown.length > 0) {
  console.error(`bench: there is no section ${unknown.join(', ')}; there are ${Object.keys(sections).join(', ')}`);
  process.exit(2);
}

const names = positionals.length > 0 ? positionals : Object.keys(sections);
if (options.here) {
  // The child: one section, for the parent to read.
  const results = await sections[names[0] as string]?.run(options.full === true);
  process.stdout.write(JSON.stringify(results), () => process.exit(0));
} else {
  if (!options.json)
    console.log(`Node ${process.version}, ${arch()}, ${cpus().length} × ${cpus()[0]?.model}, Linux ${release()}`);
  const all = names.flatMap((name) => {
    const results = runApart(name);
    if (!options.json) print(sections[name]?.title ?? name, results);
    return results.map((result) => ({
      section: name,
      ...result,
      ...('value' in result ? { ok: meetsBar(result) } : {}),
    }));
  });
  if (options.json) console.log(JSON.stringify({ node: process.version, release: release(), results: all }));
}

function runApart(name: string): Result[] {
  const args = [...process.execArgv, fileURLToPath(import.meta.url), '--here', name];
  const child = spawnSync(process.execPath, options.full ? [...args, '--full'] : args, {
    encoding: 'utf8',
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  if (child.status === 0) return JSON.parse(child.stdout) as Result[];
  return [{ name, skipped: `it ended with ${child.signal ?? `code ${child.status}`}` }];
}

function print(title: string, results: readonly Result[]): void {
  const width = Math.max(...results.map(({ name }) => name.length));
  console.log(`\n${title}`);
  for (const result of results) {
    const name = `  ${result.name.padEnd(width)}`;
    console.log('value' in result ? `${name} ${line(result)}` : `${name}   skipped: ${result.skipped}`);
  }
}

function line(row: Row): string {
  const { bar, atLeast, detail = '' } = row;
  const ok = meetsBar(row);
  const verdict =
    ok === undefined ? '' : `${atLeast ? '≥' : '≤'} ${short(bar as number)} ${ok ? 'ok' : atLeast ? 'under' : 'over'}`;
  return `${short(row.value).padStart(8)} ${row.unit.padEnd(8)} ${verdict.padEnd(12)} ${detail}`.trimEnd();
}

function short(value: number): string {
  return Number.isInteger(value) ? String(value) : value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0);
}
