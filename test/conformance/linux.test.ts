import { spawnSync } from 'node:child_process';
import { accessSync, constants, existsSync } from 'node:fs';
import { delimiter, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import t from 'tap';
import { type Kernel, linuxKernel } from '../../lib/kernel/index.ts';
import { errnoName } from '../../lib/uapi.ts';
import type { InChild } from './scenario.ts';
import { conform, publish } from './suite.ts';

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
    timeout: 20_000,
  });
  if (child.signal) return child.signal;
  if (child.status !== 0) throw new Error(`child process: status ${child.status}: ${child.stderr}`);
  return JSON.parse(child.stdout) as number[];
};

/** The first C++ compiler on PATH. */
function compiler(): string | undefined {
  const folders = (process.env.PATH ?? '').split(delimiter);
  return ['c++', 'g++', 'clang++'].find((name) => folders.some((folder) => existsSync(join(folder, name))));
}

/** Why the cases cannot run here, if they cannot. */
function open(): Kernel | { reason: string; excusable: boolean } {
  if (process.platform !== 'linux') return { reason: `this is ${process.platform}`, excusable: true };
  let kernel: Kernel;
  try {
    kernel = linuxKernel();
  } catch (error) {
    const found = compiler();
    const reason = `the addon does not load${found ? `, although there is ${found}` : ' and there is no compiler'}: ${error}`;
    return { reason, excusable: !found };
  }
  try {
    accessSync('/dev/kvm', constants.R_OK | constants.W_OK);
  } catch {
    return { reason: 'no access to /dev/kvm', excusable: true };
  }
  const kvm = kernel.openKvm();
  if (kvm < 0) return { reason: `/dev/kvm does not open: ${errnoName(kvm)}`, excusable: true };
  kernel.close(kvm);
  return kernel;
}

const kernel = open();
if ('reason' in kernel) {
  publish('linux', [], kernel.reason);
  if (kernel.excusable) t.pass(`not on real KVM: ${kernel.reason}`);
  else t.fail(kernel.reason);
} else {
  const name = `linux ${kernel.release} ${kernel.arch}`;
  publish('linux', [await conform(t, name, kernel, inChild)]);
}
