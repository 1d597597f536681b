import { existsSync } from 'node:fs';
import type { Arch } from '../../lib/model_options.ts';
import { Problem } from './command.ts';
import type { Machine } from './machines.ts';

/** By Debian's package, a file that says it is installed: a program on PATH, or a path. */
const emulator: Record<Arch, Record<string, string>> = {
  x86_64: { 'qemu-system-x86': 'qemu-system-x86_64' },
  aarch64: { 'qemu-system-arm': 'qemu-system-aarch64', 'g++-aarch64-linux-gnu': 'aarch64-linux-gnu-g++' },
};
const kernelBuild: Record<Arch, Record<string, string>> = {
  x86_64: { gcc: 'x86_64-linux-gnu-gcc', 'libelf-dev': '/usr/include/gelf.h' },
  aarch64: { 'gcc-aarch64-linux-gnu': 'aarch64-linux-gnu-gcc' },
};
const everyBuild: Record<string, string> = {
  ...{ make: 'make', flex: 'flex', bison: 'bison', bc: 'bc', 'xz-utils': 'xz', perl: 'perl', apt: 'apt-get' },
  'debian-archive-keyring': '/usr/share/keyrings/debian-archive-keyring.gpg',
};

/** Packages that a machine needs, and this host lacks. */
export function missingPackages({ arch }: Machine, buildsKernel: boolean): string[] {
  const needed = { ...emulator[arch], ...(buildsKernel && { ...everyBuild, ...kernelBuild[arch] }) };
  return Object.entries(needed).flatMap(([name, sign]) => (isThere(sign) ? [] : [name]));
}

function isThere(sign: string): boolean {
  const places = sign.startsWith('/') ? [''] : (process.env.PATH ?? '').split(':').map((folder) => `${folder}/`);
  return places.some((place) => existsSync(place + sign));
}

export function requirePackages(missing: readonly string[]): void {
  if (missing.length === 0) return;
  const names = [...new Set(missing)].join(' ');
  throw new Problem(
    `packages are missing: sudo apt install --no-install-recommends ${names}\nElsewhere than on Debian and Ubuntu: docs/machines.md`,
  );
}
