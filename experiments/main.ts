// npm run experiment <name>: measures something worth a picture. Prints a table, and writes <name>.json and <name>.svg.
//
//   --backend kvm|software   where to; by default real KVM, or the software kernel where that has no private memory
//   --seed N                 another run of the same kind
//   --out DIR                where the files go: experiments/results unless given
import { mkdirSync, writeFileSync } from 'node:fs';
import { join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { doubling } from './doubling.ts';
import type { Experiment } from './experiment.ts';
import { ioSchemes } from './io_schemes.ts';

const experiments: Readonly<Record<string, Experiment>> = { doubling, 'io-schemes': ioSchemes };

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { backend: { type: 'string' }, seed: { type: 'string' }, out: { type: 'string' } },
});
const { backend = 'auto', seed = '1' } = values;
const out = values.out ?? fileURLToPath(new URL('../../experiments/results', import.meta.url));
const [name = '', ...more] = positionals;
const experiment = Object.hasOwn(experiments, name) ? experiments[name] : undefined;
const isBackend = backend === 'auto' || backend === 'kvm' || backend === 'software';
if (!experiment || more.length > 0 || !isBackend || !/^\d+$/.test(seed)) {
  console.error('usage: npm run experiment <name> -- [--backend kvm|software] [--seed N] [--out DIR]');
  for (const [name, { title }] of Object.entries(experiments)) console.error(`  ${name.padEnd(12)}${title}`);
  process.exit(2);
}

try {
  const { data, lines, svg } = experiment.run({ backend, seed: Number(seed) });
  for (const line of lines) console.log(line);
  mkdirSync(out, { recursive: true });
  const files = { json: `${JSON.stringify(data, null, 1)}\n`, svg };
  console.log('');
  for (const [kind, content] of Object.entries(files)) {
    const file = join(out, `${name}.${kind}`);
    writeFileSync(file, content);
    console.log(`written: ${relative('', file)}`);
  }
} catch (error) {
  console.error(`experiment: ${error instanceof Error ? error.message : error}`);
  process.exitCode = 1;
}
