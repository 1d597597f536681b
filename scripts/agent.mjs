// Assembles the guest agent, native/guest/*.S, into lib/agent/code_*.ts: the package needs no assembler then. With --check it writes nothing,
// and fails when a file is not what its source gives. An architecture without an assembler here is left out, and said so.

import { spawnSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { installed, root } from './toolchain.mjs';

const PAGE = 4096;
const check = process.argv.includes('--check');
const unknown = process.argv.slice(2).filter((argument) => argument !== '--check');
if (unknown.length > 0) {
  console.error(`agent: unknown ${unknown.join(' ')}; there is --check`);
  process.exit(2);
}

const architectures = [
  { name: 'x86_64', own: 'x64', prefix: 'x86_64-linux-gnu-' },
  { name: 'aarch64', own: 'arm64', prefix: 'aarch64-linux-gnu-' },
];
const folder = mkdtempSync(join(tmpdir(), 'guest-memfd-agent-'));
try {
  for (const architecture of architectures) generate(architecture);
} finally {
  rmSync(folder, { recursive: true, force: true });
}

function generate({ name, own, prefix }) {
  const candidates = process.platform === 'linux' && process.arch === own ? [prefix, ''] : [prefix];
  const found = candidates.find((one) => ['gcc', 'objcopy', 'nm'].every((tool) => installed(`${one}${tool}`)));
  if (found === undefined) {
    console.log(
      `agent: ${name} left out, no ${prefix}gcc here (sudo apt install gcc-${prefix.slice(0, -1).replace('_', '-')})`,
    );
    return;
  }
  const target = join(root, `lib/agent/code_${name}.ts`);
  const text = source(name, assemble(name, found));
  if (!check) {
    writeFileSync(target, text);
    console.log(`agent: wrote lib/agent/code_${name}.ts`);
  } else if (readFileSync(target, 'utf8') === text) {
    console.log(`agent: ${name} is up to date`);
  } else {
    console.error(
      `agent: lib/agent/code_${name}.ts is not what native/guest/agent_${name}.S gives; run node scripts/agent.mjs`,
    );
    process.exitCode = 1;
  }
}

function assemble(name, prefix) {
  const [object, binary] = [join(folder, `${name}.o`), join(folder, `${name}.bin`)];
  run(`${prefix}gcc`, ['-c', '-nostdlib', join(root, `native/guest/agent_${name}.S`), '-o', object]);
  run(`${prefix}objcopy`, ['-O', 'binary', '-j', '.text', object, binary]);
  const bytes = readFileSync(binary);
  if (bytes.length > PAGE) throw new Error(`the agent for ${name} has ${bytes.length} bytes, more than its page`);
  const address = (symbol) => {
    const [, hex] = new RegExp(`^([0-9a-f]+) t ${symbol}$`, 'm').exec(run(`${prefix}nm`, [object])) ?? [];
    if (hex === undefined) throw new Error(`agent_${name}.S has no ${symbol}`);
    return Number.parseInt(hex, 16);
  };
  return { bytes, start: address('start'), resume: address('resume') };
}

function run(program, args) {
  const { status, stdout, stderr, error } = spawnSync(program, args, { encoding: 'utf8' });
  if (status !== 0) throw new Error(`${program} ${args.join(' ')}: ${error ?? stderr}`);
  return stdout;
}

function source(name, { bytes, start, resume }) {
  return `// Made from native/guest/agent_${name}.S by \`node scripts/agent.mjs\`. Do not edit.
import type { AgentCode } from './protocol.ts';

/** ${bytes.length} bytes. */
export const code_${name}: AgentCode = {
  base64:
    '${bytes.toString('base64')}',
  start: ${start},
  resume: ${resume},
};
`;
}
