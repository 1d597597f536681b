import { accessSync, constants, existsSync } from 'node:fs';
import { delimiter, join } from 'node:path';
import { type LinuxKernel, linuxKernel } from '../lib/kernel/linux/linux_kernel.ts';
import { errnoName } from '../lib/uapi.ts';

/** Why tests cannot run on real KVM here, and whether that is a host that lacks something (not a build that failed). */
export interface NoKvm {
  readonly reason: string;
  readonly excusable: boolean;
}

/** The first C++ compiler on PATH. */
function compiler(): string | undefined {
  const folders = (process.env.PATH ?? '').split(delimiter);
  return ['c++', 'g++', 'clang++'].find((name) => folders.some((folder) => existsSync(join(folder, name))));
}

/** The running kernel, where its /dev/kvm opens. */
export function realKernel(): LinuxKernel | NoKvm {
  if (process.platform !== 'linux') return { reason: `this is ${process.platform}`, excusable: true };
  let kernel: LinuxKernel;
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
