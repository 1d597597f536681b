import { spawnSync } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import t from 'tap';
import { realKernel } from '../kvm_host.ts';
import { patience } from '../pace.ts';
import type { InChild } from './scenario.ts';
import { conform } from './suite.ts';
import { publish } from './tally.ts';

const childFile = fileURLToPath(new URL('child.js', import.meta.url));

/** A process of its own, with nothing of this one but the fds. */
const inChild: InChild = (program, fds, { descriptors }) => {
  const command = [process.execPath, childFile, program.name, ...fds.map(({ kind }) => kind)];
  const limited = ['sh', '-c', `ulimit -n ${descriptors} && exec "$0" "$@"`, ...command];
  const [file = '', ...args] = descriptors === undefined ? command : limited;
  const child = spawnSync(file, args, {
    stdio: ['ignore', 'pipe', 'pipe', ...fds.map(({ fd }) => fd)],
    env: { PATH: process.env.PATH ?? '' },
    encoding: 'utf8',
    timeout: 20_000 * patience,
  });
  if (child.signal) return child.signal;
  if (child.status !== 0) throw new Error(`child process: status ${child.status}: ${child.stderr}`);
  return JSON.parse(child.stdout) as number[];
};

const kernel = realKernel();
if ('reason' in kernel) {
  publish('linux', { tallies: [], reason: kernel.reason });
  if (kernel.excusable) t.pass(`not on real KVM: ${kernel.reason}`);
  else t.fail(kernel.reason);
} else {
  const name = `linux ${kernel.release} ${kernel.arch}`;
  publish('linux', { tallies: [await conform(t, name, kernel, inChild)] });
}
