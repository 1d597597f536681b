export type { Arch, KernelVersion, ModelOptions } from '../model_options.ts';
export type { ReadonlyRangeMap } from '../ranges.ts';
export * as uapi from '../uapi.ts';
export type {
  CacheStatus,
  DeviceAttr,
  FileStatus,
  Kernel,
  MemoryAttributesArgs,
  Result,
  U64,
  UserMemoryRegion,
  UserMemoryRegion2,
} from './kernel.ts';
export { linuxKernel } from './linux/linux_kernel.ts';
export { softwareKernel } from './software/index.ts';
